"""The tool that counts a run's alarms and says what its guards take."""

from __future__ import annotations

import json

import pytest

from tools.faults import means
from tools.guard_costs.timed_train import PLACES, Times
from tools.measure_guards import Measured, alarms, costs


def _run(folder, *records):
    (folder / "run").mkdir()
    lines = [{"kind": "step", "step": 1, "verdict": "stepped", "metrics": {}}, *records]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_clean_run_has_no_alarm(tmp_path):
    _run(tmp_path)
    assert alarms(tmp_path, "--eval-data: 512 prompts\nstep 1 | loss 0.2 | 1.0 s\nreport: x\n") == []


@pytest.mark.parametrize(
    "line",
    [
        "warning: step 1: transient error: an update gave loss nan", "HangError: Hang: rank 1 no longer answers",
        "step 9: 3 of 4: warning: unfinished rollouts are not kept", "ParityError: step 1: the engine's",
    ],
)  # fmt: skip
def test_an_alarm_in_the_output_is_found(tmp_path, line):
    _run(tmp_path)
    assert alarms(tmp_path, f"step 1\n{line}\nstep 2\n") == [line]


def test_an_alarm_in_the_log_or_a_file_is_found(tmp_path):
    _run(
        tmp_path, {"kind": "step", "step": 2, "verdict": "skipped", "metrics": {}},
        {"kind": "step", "step": 3, "verdict": "stepped", "metrics": {"guard/transient_errors": 1.0}},
    )  # fmt: skip
    (tmp_path / "run" / "hang_20260101_000000.txt").touch()
    found = alarms(tmp_path, "")
    assert len(found) == 3 and found[0] == "step 2: skipped, {}" and "guard/transient_errors" in found[1]


def test_every_place_that_is_measured_is_there():
    for place in PLACES.values():
        means.replace(place, lambda original: original)


def test_what_a_guard_takes_is_a_share_of_the_step():
    times = Times()
    name = next(iter(PLACES))
    assert times.of_calls(name, lambda x: x + 1)(1) == 2 and len(times._calls[name]) == 1
    calls = {name: [(0.02, 0.001)] * 10, "digest of the weights (in the line above)": [(0.01, 0.0005)] * 10}
    text = costs(Measured(step_s=0.5, step_cpu_s=0.4, steps=10, calls=[{}, calls]))
    assert f"| {name} | 1.00 | 1.000 | 20.000 | 0.50% | 0.0017% |" in text
    assert "| all | | 1.000 | | 0.50% |" in text, "a part is not counted twice"
