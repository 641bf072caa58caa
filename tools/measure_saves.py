"""Measure what share of a step checkpoints cost, synchronous and with --async-save, on this machine's CPU.

    python tools/measure_saves.py --output saves            # about two minutes on two cores

A random model (Qwen3, 4 layers of width 256) learns from another one with the training command on one rank, without
checkpoints, with --save-interval 4, and with --async-save besides.  Training waits in the ``save`` phase; what a save
in the background takes from the other phases is seen in these.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_tropd.flag_parser import FlagParser
from megatron_tropd.reporting.records import of_kind, read_records
from tools.overlap.world import Costs, make_world

ROOT = Path(__file__).resolve().parent.parent
INTERVAL = 4
_WARM_UP = 4
_KINDS = {
    "none": ["--save-interval", "0"],
    "synchronous": ["--save-interval", str(INTERVAL)],
    "asynchronous": ["--save-interval", str(INTERVAL), "--async-save"],
}
_FLAGS = [
    "--objective", "tropd", "--guidance", "none", "--rollout-batch-size", "8", "--n-samples-per-prompt", "1",
    "--max-prompt-length", "64", "--max-response-length", "32", "--max-tokens-per-microbatch", "2048", "--top-k", "8",
    "--lr", "1e-6", "--on-spike", "warn", "--keep-last", "1", "--heartbeat-interval", "0",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Of a run, in seconds."""

    step: float
    """All phases of a step but the save phase; the median over the steps."""
    save: float
    """The save phase of one checkpoint; the mean over the checkpoints."""


def train(world: Path, run_dir: Path, steps: int, flags: list[str]) -> Seconds:
    """Train once; return the seconds of a step.

    Raises:
        RuntimeError: the run failed; with the end of what it printed.
    """
    shutil.rmtree(run_dir, ignore_errors=True)
    words = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
        "-m", "megatron_tropd.train", "--hf-checkpoint", world / "student", "--teacher-hf-checkpoint",
        world / "teacher", "--prompt-data", world / "train.jsonl", "--run-dir", run_dir, "--train-iters", str(steps),
        *_FLAGS, *flags,
    ]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, words)), cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1800
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    measured = [record["seconds"] for record in of_kind(read_records(run_dir / "metrics.jsonl"), "step")][_WARM_UP:]
    saves = sum(seconds.get("save", 0.0) for seconds in measured)
    return Seconds(
        step=statistics.median(sum(s for name, s in seconds.items() if name != "save") for seconds in measured),
        save=saves / (len(measured) // INTERVAL),
    )


def main() -> None:
    """Run the command."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="directory for the models and the runs")
    parser.add_argument("--steps", type=int, default=_WARM_UP + 4 * INTERVAL, help="steps of a run")
    parser.add_argument(
        "--repetitions", type=int, default=1, help="runs of each kind, of which the medians are printed"
    )
    options = parser.parse_args()
    output = options.output.resolve()
    world = make_world(output / "world", Costs(teacher_layers=4, prompt_words=48), num_prompts=64)
    runs: dict[str, list[Seconds]] = {name: [] for name in _KINDS}
    for _ in range(options.repetitions):
        for name, flags in _KINDS.items():
            runs[name].append(train(world, output / name, options.steps, flags))
    saved = sum(path.stat().st_size for path in (output / "synchronous/checkpoints").rglob("*") if path.is_file())
    print(f"a checkpoint has {saved / 1e6:.0f} MB; one every {INTERVAL} steps\n")
    print("| checkpoints | step without save phase, s | save phase of a checkpoint, s | share of a step |")
    print("|---|---|---|---|")
    for name, repeated in runs.items():
        step, save = (statistics.median(getattr(run, field) for run in repeated) for field in ("step", "save"))
        print(f"| {name} | {step:.2f} | {save:.3f} | {save / INTERVAL / (step + save / INTERVAL):.1%} |")


if __name__ == "__main__":
    main()
