"""A mistake in the flags of a tool gives one message and no traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.torchrun_jobs import ROOT, environment


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("-m megatron_tropd.reporting.report FILE/run", "run directory FILE/run does not exist"),
        ("tools/measure_conversion.py --set hidden_size big", "--set hidden_size big: expected a number"),
        ("tools/measure_conversion.py --work-dir FILE/work", "FILE/work"),
        ("tools/make_small_world.py --save FILE/world", "--save FILE/world cannot be written"),
        ("tools/benchmark_head.py --out FILE/out", "--out FILE/out cannot be made"),
        ("tools/gpu_acceptance.py --out FILE/out", "--out FILE/out cannot be made"),
        ("tools/plan_weights.py --model FILE", "--model FILE is no directory with a config.json"),
        ("tools/collect_results.py FILE", "FILE is not a directory; expected one with TABLE/SETTING/ROW/row.json"),
        ("tools/compare_runs.py FILE", "FILE is no directory; expected a run directory"),
        ("tools/plan_run.py --num-gpus 1 --hf-checkpoint FILE", "FILE/config.json does not exist"),
    ],
)
def test_a_mistake_has_a_message(tmp_path, command, message):
    file = tmp_path / "file"
    file.touch()
    words = command.replace("FILE", str(file)).split()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words], cwd=ROOT, env=environment(), capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and message.replace("FILE", str(file)) in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
