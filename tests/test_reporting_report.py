"""Curves and report, from the files of a run."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from html.parser import HTMLParser

import pytest

from megatron_tropd.reporting.records import eval_record, step_record
from megatron_tropd.reporting.report.plots import FIGURES, make_plots
from megatron_tropd.reporting.report.write import write_report
from megatron_tropd.reporting.rollout_samples import RolloutSample
from megatron_tropd.reporting.run_directory import RunDirectory
from tests.test_reporting_files import eval_report, step_report

pytestmark = pytest.mark.slow

ATTACK = "</div><script>alert(1)</script><img src=x onerror=\"a('b')\">\u202e\x00\ud800"
METRICS = {
    "tropd/trusted_frac": 0.9,
    "guidance/frac": 0.1,
    "student/entropy": 0.7,
    "rollout/len_mean": 30.0,
    "parity/logprob_abs_diff_mean": 1e-6,
    "teacher/busy_frac": 0.5,
    "teacher/wait_s": 0.2,
    "teacher/math/reward_mean": -0.3,
    "engine/idle_frac": 0.25,
    "parity/logprob_abs_diff_max": 1e-4,
}


class Reader(HTMLParser):
    """Tags, attributes and text of a page, and a check that tags close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.values, self.text, self._open = [], [], "", []
        self.feed(page)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "a<b>"
    plain = {"uid": 1, "sample_index": 0, "prompt": ATTACK, "guidance": "GUIDE", "finish": "stop"}
    samples = [
        RolloutSample(**plain, response=ATTACK, correct=False),
    ]
    with RunDirectory.create(path, config={"lr": 1.0, "note": ATTACK[:-1]}, resume=False) as run:
        run.evaluation(eval_report(0, 0.25))
        for step in range(1, 9):
            broken = {"loss": math.nan, "grad_norm": math.inf, "verdict": "skipped"} if step == 4 else {}
            run.step(step_report(step, metrics=METRICS | {"other/<b>": 1.0}, **broken))
            run.rollouts(step, samples)
        run.evaluation(eval_report(8, 0.5))
    return path


@pytest.fixture(scope="module")
def page(run_dir):
    return write_report(run_dir).read_text()


def test_every_figure_is_written_and_not_empty(run_dir, tmp_path):
    records = [step_record(step_report(step, metrics=METRICS)) for step in range(1, 100)] + [
        eval_record(eval_report(9))
    ]
    paths = make_plots(records, tmp_path)
    assert {path.name for path in paths} == {f"{name}.{kind}" for name in FIGURES for kind in ("svg", "png")}
    assert all(path.stat().st_size > 4000 for path in paths)
    assert all("currentColor" in path.read_text() for path in paths if path.suffix == ".svg")


def test_figures_without_data_are_left_out(tmp_path):
    assert make_plots([], tmp_path) == []
    bare = step_record(step_report(1, metrics={}, loss=math.nan, grad_norm=math.nan))
    names = {path.stem for path in make_plots([bare], tmp_path)}
    assert names == {"loss", "grad_norm", "step_time"}


def test_report_shows_the_run(page):
    reader = Reader(page)
    for text in ("25.0%", "50.0%", "+25.0", "1 skipped", "generate", "tropd/trusted_frac", "torch"):
        assert text in reader.text
    assert reader.tags.count("img") == len(FIGURES)


def test_report_is_one_safe_file(page):
    reader = Reader(page)
    assert not {"iframe", "link", "object", "svg"} & set(reader.tags)
    assert reader.tags.count("script") == 2  # the samples, and the viewer (test_reporting_viewer.py)
    assert not [entry for entry in reader.values if entry[1].startswith("on") or entry[1] == "href"]
    assert all(value.startswith("data:image/") for _, name, value in reader.values if name == "src")
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page and "\\u003cscript\\u003ealert(1)" in page
    assert not re.search("[\u202e\x00]", page)
    assert "alert(1)" in reader.text  # shown, as text


def test_report_can_be_made_again_from_its_files(run_dir, page, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(run_dir)])
    runpy.run_module("megatron_tropd.reporting.report", run_name="__main__")  # as ``python -m`` does
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    assert (run_dir / "report.html").read_text() == page


def test_report_of_a_run_that_has_only_begun(tmp_path):
    RunDirectory.create(tmp_path, config={}, resume=False).close()
    assert "No evaluation was recorded" in Reader(write_report(tmp_path).read_text()).text
    with pytest.raises(ValueError, match="does not exist"):
        write_report(tmp_path / "nowhere")


def test_changed_flags_are_shown_where_defaults_are_known(tmp_path):
    RunDirectory.create(tmp_path, config={"lr": 2.0, "seed": 1}, resume=False, defaults={"lr": 1.0, "seed": 1}).close()
    page = write_report(tmp_path).read_text()
    assert "differ from their defaults" in page and "<code>lr</code>" in page and "<code>seed</code>" not in page
    assert json.loads((tmp_path / "env.json").read_text())["changed_flags"] == {"lr": 2.0}
