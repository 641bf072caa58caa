"""The page that compares runs: what it says, that it is one safe file, and mistakes."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from megatron_tropd.benchmarks.compare import compare
from megatron_tropd.reporting.run_directory import RunDirectory
from tests.results_tree import make_benchmark, make_row, make_run
from tests.test_reporting_files import eval_report
from tests.test_reporting_report import ATTACK, Reader
from tools.compare_runs import main
from tools.results.compare_input import load
from tools.results.compare_page import comparison_page, flags, overview
from tools.results.compare_scores import benchmarks, evaluations

HOSTILE = "<script>alert(1)</script>&\"'"


def cells(html):
    """Rows of all tables as texts."""
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [[Reader(cell).text for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)] for row in rows]


def test_page_is_one_safe_file(tmp_path):
    changes = {"metrics": {"own/<b>$x": math.nan, "student/entropy": 0.5}}
    make_run(tmp_path / "a", config={"note": ATTACK[:-1]}, changes=lambda step: changes)
    make_run(tmp_path / "b", config={"note": HOSTILE}, evaluations=[eval_report(3, decoding=HOSTILE)])
    with (tmp_path / "a" / "metrics.jsonl").open("a") as stream:
        stream.write(HOSTILE + "\n")
    (tmp_path / "a" / "env.json").write_text(json.dumps({"host": HOSTILE, "gpus": [HOSTILE] * 2, "git": HOSTILE}))
    runs = load([tmp_path / "a", tmp_path / "b"], [HOSTILE, "$\\frac" + "x" * 500], [])
    page = comparison_page(runs)
    reader = Reader(page)
    assert not {"script", "iframe", "link", "object", "svg", "b"} & set(reader.tags)
    assert not [entry for entry in reader.values if entry[1].startswith("on") or entry[1] == "href"]
    assert all(value.startswith("data:image/svg+xml;base64,") for _, name, value in reader.values if name == "src")
    assert "default-src 'none'" in page and "<script>" not in page and not re.search("[\u202e\x00]", page)
    for text in ("alert(1)", "1 damaged line left out (4)", f"2 x {HOSTILE}", "own: 1 metric", "x" * 500):
        assert text in reader.text
    assert reader.tags.count("img") == len({"eval", "train", "student", "own", "tropd", "guidance", "time", "tokens"})


def test_overview_has_steps_commit_and_machine(tmp_path):
    make_run(tmp_path / "long", steps=3, iterations=5, changes=lambda step: {"verdict": "skipped"} if step == 2 else {})
    make_run(tmp_path / "done", steps=3)
    RunDirectory.create(tmp_path / "begun", config={"lr": 1.0}, resume=False).close()
    environment = {"git": {"sha": "abcdef0123456789", "dirty": True}, "host": "node1", "gpus": ["H100", "H100", "T4"]}
    (tmp_path / "done" / "env.json").write_text(json.dumps(environment | {"started": "2026-01-02"}))
    (tmp_path / "long" / "env.json").write_text("{")
    (tmp_path / "long" / "config.yaml").write_text("train-iters: 5\n")
    runs = load([tmp_path / "long", tmp_path / "done", tmp_path / "begun"], None, [])
    head, long, done, begun = cells(overview(runs))
    assert long[:5] == ["long", "step 3 of 5 (unfinished)", "1", "unknown", "unknown"]
    assert done[:6] == ["done", "3", "0", "abcdef012345 with local changes", "node1: 2 x H100, 1 x T4", "2026-01-02"]
    assert begun[1] == "nothing recorded" and len(head) == 7
    assert "env.json cannot be read" in overview(runs)
    assert Reader(comparison_page(runs)).tags.count("img") == 5  # as many as the runs with records have groups


def test_flags_that_differ(tmp_path):
    for name, config in {
        "a": {"lr": 1.0, "seed": 1, "x": True},
        "b": {"lr": 2.0, "seed": 1, "x": 1, "new": "z"},
    }.items():
        make_run(tmp_path / name, config=config)
    make_run(tmp_path / "c")
    (tmp_path / "c" / "config.yaml").unlink()
    html = flags(load([tmp_path / name for name in "abc"], None, []))
    assert cells(html) == [["flag", "a", "b"], ["lr", "1.0", "2.0"], ["x", "True", "1"], ["new", "not given", "z"]]
    assert "2 other flags are the same" in html and "No configuration: c." in html


def test_evaluations_less_the_first(tmp_path):
    make_run(tmp_path / "a", evaluations=[eval_report(0, 0.9), eval_report(3, 0.5), eval_report(3, 0.6, "top_p_0.7")])
    make_run(tmp_path / "b", evaluations=[replace(eval_report(3, 0.75), std_error=0.12)])
    make_run(tmp_path / "c", evaluations=[replace(eval_report(2, 0.25), std_error=math.nan)])
    found = cells(evaluations(load([tmp_path / name for name in "abc"], None, [])))
    assert found[1:5] == [
        ["greedy", "a", "50.00 \xb1 5.00", "", "100", "3"],
        ["greedy", "b", "75.00 \xb1 12.00", "+25.00 \xb1 13.00", "100", "3"],
        ["greedy", "c", "25.00", "-25.00", "100", "2"],
        ["top_p_0.7", "a", "60.00 \xb1 5.00", "", "100", "3"],
    ]
    assert found[5] == ["top_p_0.7", "b", "not evaluated", "", "", ""]


def test_benchmarks_are_compared_question_by_question(tmp_path):
    means = {"opd": [1.0, 0.0, 0.5, 0.5], "tropd": [1.0, 1.0, 0.5, 1.0], "other": [0.0, 0.0, 0.0, 0.0]}
    for row, values in means.items():
        path = make_row(tmp_path, row)
        make_run(path / "seed-1" / "run")
        protocol = {"truncated": "graded"} if row == "other" else {}
        make_benchmark(path / "seed-1" / "benchmark", {"aime24": values, "amc23": values[::-1]}, **protocol)
    base = tmp_path / "table1" / "skywork-math"
    runs = load([base / row / "seed-1" for row in means], None, [])
    assert [named.name for named in runs] == ["opd/seed-1", "tropd/seed-1", "other/seed-1"]
    html = benchmarks(runs)
    rows = cells(html)
    assert ["opd/seed-1", "AIME 2024", "50.00 +- 20.41"] in rows
    expected = compare(base / "tropd" / "seed-1" / "benchmark", base / "opd" / "seed-1" / "benchmark")
    shown = [row for row in rows if row[0] == "tropd/seed-1" and len(row) == 5]
    assert [row[1:3] for row in shown] == [["AIME 2024", "+37.50"], ["AMC 2023", "+37.50"], ["mean", "+37.50"]]
    for row, found in zip(shown, expected.values(), strict=True):
        assert row[3:] == [f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}]", f"{found.p_value:.4f}"]
    assert not [row for row in rows if row[0] == "other/seed-1" and len(row) == 5]
    assert "other/seed-1 and opd/seed-1 are not compared" in html and "not measured in the same way" in html


def test_benchmarks_elsewhere_belong_to_a_run_by_its_name(tmp_path):
    for name in ("a", "a=b"):
        make_run(tmp_path / name)
        make_benchmark(tmp_path / f"of {name}", {"aime24": [1.0, 0.0]})
    given = [f"{name}={tmp_path}/of {name}" for name in ("a", "a=b")]
    runs = load([tmp_path / "a", tmp_path / "a=b"], None, given)
    assert [named.benchmark.name for named in runs] == ["of a", "of a=b"]
    with pytest.raises(ValueError, match=r"--benchmark c=d: expected NAME=DIR, NAME one of a, a=b"):
        load([tmp_path / "a", tmp_path / "a=b"], None, ["c=d"])
    with pytest.raises(ValueError, match=r"/no has no scores/; expected an --output of the benchmark command"):
        load([tmp_path / "a"], None, [f"a={tmp_path}/no"])


def test_command_writes_a_page_of_a_single_damaged_run(tmp_path, capsys):
    make_run(tmp_path / "run a", evaluations=[eval_report(3)])
    metrics = tmp_path / "run a" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([lines[0], lines[1][:40], '{"kind": "step", "step": "x"}', *lines[2:], "[1]"]))
    assert main([str(tmp_path / "run a"), "--output", str(tmp_path / "page.html")]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "page.html")
    assert err == f"compare_runs: {metrics}: 3 damaged lines left out (2, 3, 6)\n"
    reader = Reader((tmp_path / "page.html").read_text())
    assert "run a" in reader.text and "50.00 \xb1 5.00" in reader.text and "3 damaged lines left out" in reader.text


def test_mistakes_have_one_message(tmp_path, capsys):
    def told(*words):
        code = main([*map(str, words), "--output", str(tmp_path / "page.html")])
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and not (tmp_path / "page.html").exists()
        return code, lines[0]

    good, again = make_run(tmp_path / "a"), make_run(tmp_path / "other" / "a")
    (tmp_path / "empty").mkdir()
    RunDirectory.create(tmp_path / "begun", config={}, resume=False).close()
    code, line = told(tmp_path / "empty")
    assert code == 2 and line.startswith(
        f"compare_runs: {tmp_path}/empty has no metrics.jsonl; expected a run directory"
    )
    assert "no does not exist; expected a run directory" in told(good, tmp_path / "no")[1]
    code, line = told(good, again)
    assert code == 2 and f"{good} and {again} are both called a; give --names, one for each run" in line
    assert "--names has 1 names for 2 runs" in told(good, again, "--names", "x")[1]
    assert "both called x" in told(good, again, "--names", "x", "x")[1]
    assert told(tmp_path / "begun") == (2, f"compare_runs: nothing is recorded yet in {tmp_path}/begun")
    with RunDirectory.create(tmp_path / "evaluated", config={}, resume=False) as run:
        run.evaluation(eval_report(0))
    code, line = told(tmp_path / "evaluated", good)
    assert (
        code == 2
        and "no two of the runs have a metric in common: evaluated has eval/greedy; a has guidance/frac," in line
    )
    code = main([str(good), "--output", str(good / "metrics.jsonl" / "page.html")])
    assert code == 1 and "page.html cannot be written" in capsys.readouterr().err
