"""Metric names and their documentation; tensorboard and wandb."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from megatron_tropd.reporting.metric_names import METRICS, PHASES, markdown_table
from megatron_tropd.reporting.records import eval_record, eval_scalars, step_record, step_scalars
from megatron_tropd.reporting.sinks import Sinks, check_sinks, make_sinks
from megatron_tropd.reports import Accuracy
from tests.test_reporting_files import eval_report, step_report

PACKAGES = {"tensorboard": "tensorboard_dir", "wandb": "wandb_project"}


def is_installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


class FileSink:
    """Writes to a stream; a closed stream makes it fail the way a full disk would."""

    def __init__(self, stream) -> None:
        self.stream = stream

    def scalars(self, step, values) -> None:
        self.stream.write(f"{step} {sorted(values)}\n")

    def close(self) -> None:
        self.stream.flush()


def test_documentation_holds_the_table():
    document = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    assert markdown_table() in document, "run megatron_tropd.reporting.metric_names.markdown_table() and paste it"


def test_flat_names_are_in_the_table():
    seconds = dict.fromkeys(PHASES, 1.0)
    record = step_record(step_report(1, metrics={}, seconds=seconds))
    names = {name for name in step_scalars(record) if not name.startswith("tokens/")}
    assert names <= METRICS.keys()
    record = eval_record(eval_report(1, domains={"math": Accuracy(accuracy=0.8, std_error=0.1, num_prompts=50)}))
    scalars = eval_scalars(record)
    assert scalars["eval/greedy/accuracy"] == 0.5 and scalars["eval/greedy/std_error"] == 0.05
    assert scalars["eval/greedy/math/accuracy"] == 0.8 and scalars["eval/greedy/math/std_error"] == 0.1
    older = {key: value for key, value in record.items() if key not in ("std_error", "num_samples", "domains")}
    assert eval_scalars(older) == {key: scalars[key] for key in scalars if "std_error" not in key and "math" not in key}


@pytest.mark.parametrize("package", PACKAGES)
def test_missing_package_names_the_extra(package):
    asked = dict.fromkeys(PACKAGES.values()) | {PACKAGES[package]: "x"}
    problems = check_sinks(**asked)
    if is_installed(package):
        assert problems == []
        return
    assert f"megatron-tropd[{package}]" in problems[0] and f"--{PACKAGES[package].replace('_', '-')} x" in problems[0]
    with pytest.raises(ValueError, match="pip install"):
        make_sinks(**asked, wandb_exp_name=None, config={}, run_dir=Path("unused"))


def test_a_folder_of_that_name_is_not_the_package(tmp_path, monkeypatch):
    before = check_sinks(tensorboard_dir=None, wandb_project="x")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert check_sinks(tensorboard_dir=None, wandb_project="x") == before


def test_a_failing_sink_warns_once_and_the_others_go_on(tmp_path):
    streams = [(tmp_path / name).open("w") for name in ("good", "bad")]
    sinks = Sinks({"good": FileSink(streams[0]), "bad": FileSink(streams[1])})
    streams[1].close()
    with pytest.warns(RuntimeWarning, match="bad failed and is left out") as caught:
        for step in (1, 2, 3):
            sinks.record(step_record(step_report(step)))
        sinks.record(eval_record(eval_report(3)))
        sinks.close()
    assert len(caught) == 1
    written = (tmp_path / "good").read_text().splitlines()
    assert len(written) == 4 and "train/loss" in written[0] and "eval/greedy/accuracy" in written[3]
    streams[0].close()


def test_tensorboard_writes_event_files(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    asked = {"tensorboard_dir": str(tmp_path / "tb"), "wandb_project": None, "wandb_exp_name": None}
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with make_sinks(**asked, config={}, run_dir=tmp_path, start_step=start) as sinks:
            for step in steps:
                sinks.record(step_record(step_report(step)))
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


@pytest.mark.fault(number=30)
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    asked = {"tensorboard_dir": None, "wandb_project": "p", "wandb_exp_name": "e"}
    for _ in range(2):
        with make_sinks(**asked, config={"api-key": "hunter2"}, run_dir=tmp_path) as sinks:
            sinks.record(step_record(step_report(1)))
    name = (tmp_path / "wandb_id.txt").read_text().strip()
    files = [path for path in (tmp_path / "wandb").rglob("*.wandb") if path.is_file()]
    assert files and all(name in path.name and b"hunter2" not in path.read_bytes() for path in files)
