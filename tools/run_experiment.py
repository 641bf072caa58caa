"""Go the whole way of an experiment with tiny models, by the commands of a real one (``make experiment``).

    published data -> prompts -> finetuned teacher and student -> responses -> TrOPD -> export -> benchmark -> table

Every file between two commands is real and stays in --save.  A command that was ended goes on when this one is given
again; stages that are done are skipped.  Exits with 1 if the trained student is not better than before by --min-points.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_tropd.flag_parser import FlagParser  # noqa: E402
from tools.experiment.stages import Interpreters, Stage, reports, stages  # noqa: E402
from tools.experiment.world import make_world  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """Return the command-line parser of this command."""
    flags = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--save", type=Path, default=ROOT / "runs/experiment", help="default: runs/experiment")
    flags.add_argument("--steps", type=int, default=60, help="of TrOPD")
    flags.add_argument("--min-points", type=float, default=20.0, help="expected rise, in percentage points")
    flags.add_argument("--sglang-python", type=Path, default=ROOT / ".venv-sglang/bin/python")
    flags.add_argument("--evalscope-python", type=Path, default=ROOT / ".venv-benchmark/bin/python")
    return flags


def run(title: str, words: Sequence[str]) -> None:
    """Print a command and run it; end the experiment if it fails."""
    print(f"\n=== {title}\n$ {shlex.join(words)}", flush=True)
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore",
        "CUDA_VISIBLE_DEVICES": "",  # models this small need no GPU
    }  # fmt: skip
    start = time.monotonic()
    with subprocess.Popen(words, cwd=ROOT, env=environment) as process:
        try:
            code = process.wait()
        except BaseException:  # ended from outside: so is the command, which keeps what it has
            process.terminate()
            raise
    if code:
        sys.exit(f"experiment: {title!r} failed with exit code {code}; the error is printed above")
    print(f"({time.monotonic() - start:.0f} s)", flush=True)


def run_stage(stage: Stage, done: Path) -> None:
    """Run a stage, unless ``done``, a file with its words, says that it is done."""
    words = json.dumps(stage.words)
    if done.exists():
        if done.read_text(encoding="utf-8") != words:
            sys.exit(f"experiment: {stage.title!r} was done with other flags ({done}); give another --save")
        print(f"\n=== {stage.title}: done before", flush=True)
        return
    run(stage.title, stage.words)
    if not stage.output.exists():
        sys.exit(f"experiment: {stage.title!r} ended well but did not write {stage.output}")
    done.parent.mkdir(exist_ok=True)
    done.write_text(words, encoding="utf-8")


def accuracy(directory: Path) -> float:
    """Return the score of a benchmark directory, in percent."""
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    return 100 * float(summary["aime24"]["metrics"]["accuracy"]["mean"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment; returns 1 where the student did not learn."""
    args = parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    out = args.save.absolute()
    if not (out / "world").exists():
        out.mkdir(parents=True, exist_ok=True)
        make_world(out / "world")
    interpreters = Interpreters(sglang=args.sglang_python, evalscope=args.evalscope_python)
    for stage in stages(out, interpreters, steps=args.steps):
        run_stage(stage, out / "done" / f"{stage.name}.json")
    for words in reports(out):
        run("Results", words)
    before, after = (accuracy(out / "benchmark" / name) for name in ("before", "after"))
    good = after - before >= args.min_points
    print(f"\n  expected: the student rises by at least {args.min_points:g} points: {'yes' if good else 'NO'}")
    print(f"  everything between the commands is in {out}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
