"""``make chaos``: faults that a seed chooses, the same command after each, and the result of the unbroken run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from tests.tiny_run import flags, make_world
from tests.torchrun_jobs import environment, start
from tools.faults import chaos
from tools.faults.chaos_job import ChaosError, ChaosJob, last_step
from tools.faults.chaos_plan import KINDS, draw
from tools.faults.matrix import FAULTS
from tools.faults.same_result import differences

PLAN = {"steps": 12, "every": 4, "save_interval": 2}
SEED = 2823
"""Draws three of different places: inside an update, inside a save, from outside."""


def test_a_plan_is_that_of_its_seed():
    assert draw(3, **PLAN) == draw(3, **PLAN) != draw(4, **PLAN)
    assert {kind.row for kind in KINDS.values()} <= {fault.number for fault in FAULTS}
    drawn = set()
    for seed in range(100):
        plan = draw(seed, steps=210, every=20, save_interval=10)
        assert [(fault.step - 1) // 10 for fault in plan] == list(range(0, 20, 2)), "one in every first half"
        assert len({fault.kind for fault in plan}) == 10, "none twice before all have come"
        assert all(fault.step > 20 for fault in plan if fault.of.damages), "there is one to fall back to"
        assert all(fault.rank in fault.of.ranks for fault in plan)
        drawn |= {fault.kind for fault in plan}
    assert drawn == set(KINDS)


def test_a_folder_without_an_unbroken_run_is_refused_before_hours_of_work(tmp_path, capsys):
    (tmp_path / "unbroken").mkdir()
    with pytest.raises(SystemExit) as end:
        chaos.main(["--unbroken", str(tmp_path), "--work", str(tmp_path / "work")])
    assert end.value.code == 2 and f"--unbroken {tmp_path}: no unbroken run" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def _finished(run):
    """What a run of two steps leaves, in short."""
    final = run / "checkpoints" / "iter_0000002"
    for folder in (final / "hf", run / "hf_export"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    (final / "__0_0.distcp").write_bytes(b"weights")
    (final / "run.json").write_text(str(run))
    torch.save({"optimizer": {"step": torch.tensor(2.0)}, "rate": 0.1}, final / "common.pt")
    _log(run, [_step(1), _step(2)])
    return run


def _step(number, **changes):
    metrics = {"tropd/outlier_frac": 0.25, "memory/peak_bytes": 1.0, **changes}
    return {"kind": "step", "step": number, "loss": 0.5, "seconds": {"train": 1.0}, "metrics": metrics}


def _log(run, records):
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _change_optimizer(run):
    torch.save(
        {"optimizer": {"step": torch.tensor(2.0000002)}, "rate": 0.1}, run / "checkpoints/iter_0000002/common.pt"
    )


CHANGES = {
    "weights": (lambda run: (run / "checkpoints/iter_0000002/__0_0.distcp").write_bytes(b"weightt"), "__0_0.distcp differs"),
    "no checkpoint": (lambda run: shutil.rmtree(run / "checkpoints"), "__0_0.distcp differs"),
    "optimizer": (_change_optimizer, "common.pt differs"),
    "export": (lambda run: (run / "hf_export/config.json").write_text("[]"), "hf_export: config.json differs"),
    "number": (lambda run: _log(run, [_step(1), _step(2, **{"tropd/outlier_frac": 0.26})]), "is 0.26, expected 0.25"),
    "twice": (lambda run: _log(run, [_step(1), _step(2), _step(2)]), "step 2  is there more than once"),
    "missing": (lambda run: _log(run, [_step(2)]), "steps are missing"),
    "left": (lambda run: (run / "checkpoints/iter_0000002.tmp-1234").mkdir(), "tmp-1234 is left"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_is_found(tmp_path, change):
    unbroken, broken = _finished(tmp_path / "unbroken"), _finished(tmp_path / "broken")
    _log(broken, [_step(1, **{"memory/peak_bytes": 2.0}), {**_step(2), "seconds": {"train": 9.0}}])
    assert differences(broken, unbroken, steps=2) == []
    apply, text = CHANGES[change]
    apply(broken)
    assert any(text in one for one in differences(broken, unbroken, steps=2))


def test_the_last_finished_step_is_that_of_a_whole_line(tmp_path):
    assert last_step(tmp_path) == 0
    _log(tmp_path, [_step(1), _step(2), {"kind": "eval", "step": 2}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 3, "lo')
    assert last_step(tmp_path) == 2


@pytest.mark.parametrize("code", [0, 1])
def test_a_job_that_ends_without_its_fault_is_an_error(tmp_path, code):
    class Ends(chaos.Launch):
        def __init__(self, folder, more):
            (folder / "log").write_text("what it said")
            self._log, self._process = folder / "log", subprocess.Popen([sys.executable, "-c", f"exit({code})"])
            self.pid = self._process.pid

    job = ChaosJob(Ends, tmp_path / "run", tmp_path, print)
    with pytest.raises(ChaosError, match=f"ended with {code}.*\nwhat it said"):
        job.run(draw(0, **PLAN))


@pytest.mark.slow
@pytest.mark.thorough
def test_a_run_with_faults_ends_as_the_one_without(tmp_path):
    world = make_world(tmp_path / "world")
    kinds = sorted(set(KINDS) - {"sigstop-rank"})  # its deadline would be most of the time

    def of(run_dir):
        argv = flags(world, run_dir, train_iters=PLAN["steps"], tensor_model_parallel_size=2)
        argv += chaos.flags(PLAN["save_interval"])
        return lambda folder, more: start(
            argv, folder, environment(**more), chaos.MODULE, launcher=chaos.LAUNCHER, ranks=2
        )

    result = chaos.chaos(of, tmp_path, seed=SEED, kinds=kinds, **PLAN)
    assert result.differences == []
    assert [one.fault.kind for one in result.seen] == ["nan-once", "kill-in-save", "flipped-bit"]
    assert [one.exit_code for one in result.seen] == [None, 1, -9]
    assert [one.made_again for one in result.seen[:2]] == [0, 2] and result.seen[2].made_again >= 2
    assert "throughput kept" in chaos.table(result, SEED)
