"""Runs the main job on real input, without any prepared files, in one command (``make quickstart``).

Makes the small world, converts both models to Megatron checkpoints, trains with TrOPD on two ranks
(student TP 2; teacher PP 2), and compares the student before and after.  Exits with 1 if greedy and
top-p accuracy did not both rise by --min-points.  With --teacher file the teacher scores the
responses of the data once, and the student learns from the stored scores (--objective kd): without
rollouts, so without TrOPD.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_tropd.flag_parser import FlagParser  # noqa: E402
from megatron_tropd.reporting.records import of_kind, read_records  # noqa: E402

JUDGED = ("greedy", "top_p_0.7")
BAR_WIDTH = 40
RANKS = {"colocated": 2, "dedicated": 4, "server": 2, "file": 2}
"""Ranks of the job by the teacher's placement.  The student is TP 2; a dedicated teacher, PP 2, has the other two."""
FILE_NOTE = """
  This run was not TrOPD.  With stored scores the student learns from the teacher's responses in the data, none of
  which it wrote (--objective kd: the teacher's top-k forward KL at every token).  A step trains on 16 of these
  responses; with the other placements it trains on 64 that the student wrote.  There is no gate and no guidance:
  "trusted" above is what a gate would say of the data's tokens.
"""
"""Printed below the results of --teacher file; the numbers are those of examples/quickstart.yaml."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A command of the job, and what it is for."""

    title: str
    words: tuple[str | Path, ...]


def run(part: Part) -> None:
    """Run one part of the job and print its command; end the quickstart if the part fails."""
    words = [str(word) for word in part.words]
    print(f"\n=== {part.title}\n$ {' '.join(words)}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # two ranks would need two GPUs, and models this small need none
    code = subprocess.run(words, cwd=ROOT, env=environment, check=False).returncode
    if code:
        sys.exit(f"quickstart: {part.title!r} failed with exit code {code}; the error is printed above")


def accuracies(records: list[dict[str, Any]], decoding: str) -> dict[int, float]:
    """Accuracy by step."""
    return {r["step"]: r["accuracy"] for r in of_kind(records, "eval") if r["decoding"] == decoding}


def print_curve(curve: dict[int, float]) -> None:
    """The learning curve, as text."""
    for step, accuracy in sorted(curve.items()):
        print(f"  step {step:4d} | {'#' * round(accuracy * BAR_WIDTH):<{BAR_WIDTH}} | {accuracy:6.1%}")


def judge(run_dir: Path, min_points: float) -> bool:
    """Print the results; returns whether accuracy rose by ``min_points``, as the README promises."""
    records = read_records(run_dir / "metrics.jsonl")
    print("\n=== Learning curve: greedy accuracy (whole set at the ends, its first prompts between)")
    print_curve(accuracies(records, "greedy"))
    print("\n=== Exact match on held-out prompts\n  decoding       before   after   points")
    good = True
    for decoding in (*JUDGED, "temperature_1"):
        curve = accuracies(records, decoding)
        before, after = curve[min(curve)], curve[max(curve)]
        points = 100 * (after - before)
        judged = decoding in JUDGED
        good &= not judged or points >= min_points
        print(f"  {decoding:14} {before:6.1%}  {after:6.1%}   {points:+5.1f}{'' if judged else '   (not judged)'}")
    print(f"\n  expected: {' and '.join(JUDGED)} rise by at least {min_points:g} points: {'yes' if good else 'NO'}")
    print(f"  report:   {run_dir / 'report.html'}\n  student:  {run_dir / 'hf_export'}")
    return good


def parts(args: argparse.Namespace, world: Path, job: Path) -> list[Part]:
    """Return the commands that turn the small world into a trained student, in order."""
    python = sys.executable
    found = [
        Part(
            title=f"Convert the {model} to Megatron",
            words=(
                python, "checkpoint_convert/hf_to_megatron.py",
                "--hf-checkpoint", world / model, "--save", job / "megatron" / model,
                "--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp),
            ),
        )
        for model, tp, pp in (("student", 2, 1), ("teacher", 1, 2))
    ]  # fmt: skip
    teacher: list[str | Path] = ["--teacher-load", job / "megatron/teacher"]
    if args.teacher == "server":  # SGLang reads HF weights; the flag's layout is not the servers'
        teacher = ["--teacher-hf-checkpoint", world / "teacher", "--teacher-pipeline-model-parallel-size", "1"]
    where = ["--rollout-engine", args.engine, "--teacher-placement", args.teacher]
    if "sglang" in where or "server" in where:
        where += ["--sglang-python", args.sglang_python]
    if args.teacher == "dedicated":
        where += ["--teacher-world-size", "2"]
    ranks = str(RANKS[args.teacher])
    job_of_ranks = (python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "-m")
    flags = (
        "--config", "examples/quickstart.yaml", "--run-dir", job,
        "--pretrained-checkpoint", job / "megatron/student", *teacher,
        "--prompt-data", world / "train.jsonl", "--eval-data", world / "eval.jsonl", "--seed", str(args.seed),
    )  # fmt: skip
    train = (*job_of_ranks, "megatron_tropd.train", *flags, *where)
    if args.teacher != "file":
        return [*found, Part(title=f"Train with TrOPD on {ranks} ranks", words=(*train, *args.train_flags))]
    stored = ("--objective", "kd", "--guidance", "none", "--teacher-scores", job / "teacher_scores")
    return [
        *found,
        Part(
            title="Score the responses of the data with the teacher, once",
            words=(*job_of_ranks, "megatron_tropd.score_responses", *flags, *stored, *args.train_flags),
        ),
        Part(
            title=f"Train on the stored scores on {ranks} ranks, without a teacher",
            words=(*train, *stored, *args.train_flags),
        ),
    ]


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    flags = FlagParser(description=(__doc__ or "").split("\n\n")[0])
    flags.add_argument("--directory", type=Path, default=Path("runs"), help="directory for all files (default: runs)")
    flags.add_argument("--seed", type=int, default=0, help="seed of the world and of the run")
    flags.add_argument("--min-points", type=float, default=15.0, help="rise in accuracy that must be reached")
    flags.add_argument("--engine", choices=("embedded", "sglang"), default="embedded", help="rollout engine")
    flags.add_argument("--teacher", choices=tuple(RANKS), default="colocated", help="teacher's placement")
    flags.add_argument("--sglang-python", default=".venv-sglang/bin/python", help="interpreter of SGLang's environment")
    flags.add_argument("train_flags", nargs="*", help="after --: flags of megatron_tropd.train")
    return flags.parse_args(words)


def main() -> int:
    """Run the command; returns its exit code."""
    args = arguments()
    started = time.monotonic()
    world = args.directory / f"small_world_{args.seed}"
    job = args.directory / "quickstart"
    if not (ROOT / world / "world.json").is_file():
        make = (sys.executable, "tools/make_small_world.py", "--save", world, "--seed", str(args.seed))
        run(Part(title="Make the small world", words=make))
    shutil.rmtree(ROOT / job, ignore_errors=True)
    for part in parts(args, world, job):
        run(part)
    good = judge(ROOT / job, args.min_points)
    if args.teacher == "file":
        print(FILE_NOTE)
    print(f"  time:     {time.monotonic() - started:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
