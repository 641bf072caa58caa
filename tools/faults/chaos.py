"""A run with a random fault every few steps ends as the run without faults: ``make chaos``.

    python -m tools.faults.chaos [--seed N] [--steps 200] [--every 20] [--work DIR]

Trains the quickstart's student on two ranks, once without faults and once with faults that a seed chooses: those of the
matrix after which the same command goes on.  After each the same command is started again, as a scheduler would do.
Compares the final checkpoints (weights and optimizer), the exports and the logs bit for bit, and prints a table.
Exits with 1 if something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_tropd.flag_parser import FlagParser
from tools import quickstart
from tools.faults.chaos_job import ChaosError, ChaosJob, Seen, Start
from tools.faults.chaos_plan import KINDS, SIZE, Fault, draw
from tools.faults.same_result import differences

ROOT = Path(__file__).resolve().parents[2]
MODULE = "tools.faults.faulty_train"
LAUNCHER = ("--standalone",)


def flags(save_interval: int) -> list[str]:
    """Return the flags that a chaos run needs besides those of its models and data."""
    return [
        "--save-interval", str(save_interval), "--fallback-previous", "--rank-heartbeat-timeout", "15",
        "--heartbeat-interval", "0.1",
    ]  # fmt: skip


class Launch:
    """torchrun, whose output is in the file ``log`` of a folder.

    Args:
        words: flags of the training command.
        folder: of the output.
        more: environment variables besides those of this process.
        module: the command of the ranks.
    """

    def __init__(self, words: Sequence[str], folder: Path, more: Mapping[str, str], *, module: str = MODULE) -> None:
        self._log = folder / "log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **more}
        environment["CUDA_VISIBLE_DEVICES"] = ""  # as in the quickstart
        launcher = [
            sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *LAUNCHER, "--nproc-per-node", str(SIZE),
        ]  # fmt: skip
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*launcher, "-m", module, *words], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.pid = self._process.pid

    @property
    def output(self) -> str:
        """Return what it printed so far."""
        return self._log.read_text(errors="replace")

    def poll(self) -> int | None:
        """Return its exit code; None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float) -> int:
        """Wait for its end and return its exit code."""
        return self._process.wait(timeout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Of a chaos run."""

    seen: list[Seen]
    unbroken_s: float
    broken_s: float
    differences: list[str]


def chaos(
    start: Callable[[Path], Start], work: Path, *, seed: int, steps: int, every: int, save_interval: int,
    kinds: Sequence[str] = tuple(KINDS), unbroken: Path | None = None, say: Callable[[str], None] = print,
) -> Result:  # fmt: skip
    """Make both runs in ``work`` and compare them.

    Args:
        start: of a run directory, how a launch of its command is started; the command has :func:`flags`.
        work: the runs are in its folders ``unbroken`` and ``broken``, which are not there yet.
        seed: of the plan, as are ``steps``, ``every``, ``save_interval`` and ``kinds`` (:func:`chaos_plan.draw`).
        unbroken: the ``work`` of an earlier call, whose unbroken run is compared with, instead of a new one.
        say: prints a line.

    Raises:
        ChaosError: a run failed.
    """
    plan = draw(seed, steps=steps, every=every, save_interval=save_interval, kinds=kinds)
    if unbroken is None:
        unbroken = work
        _run(start, work, "unbroken", [], say)
    seen = _run(start, work, "broken", plan, say)
    found = differences(work / "broken", unbroken / "unbroken", steps=steps)
    seconds = [json.loads((runs / f"{name}.json").read_text())["seconds"] for runs, name in
               ((unbroken, "unbroken"), (work, "broken"))]  # fmt: skip
    return Result(seen=seen, unbroken_s=seconds[0], broken_s=seconds[1], differences=found)


def _run(
    start: Callable[[Path], Start], work: Path, name: str, plan: Sequence[Fault], say: Callable[[str], None]
) -> list[Seen]:
    """Make one run, and write beside it how long it took."""
    scratch = work / f"launches_{name}"
    scratch.mkdir(parents=True)
    began_s = time.monotonic()
    seen = ChaosJob(start(work / name), work / name, scratch, say).run(plan)
    seconds = time.monotonic() - began_s
    (work / f"{name}.json").write_text(json.dumps({"seconds": seconds}))
    say(f"{name}: {seconds:.1f} s")
    return seen


def table(result: Result, seed: int) -> str:
    """Return the result as a Markdown table with a sentence below it."""
    lines = [
        "| fault | row above | after step | exit code | ended, s | next step, s | steps made again |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in result.seen:
        code, end = ("goes on", "") if one.exit_code is None else (one.exit_code, f"{one.end_s:.1f}")
        cells = (one.what, one.fault.of.row, one.step, code, end, f"{one.next_s:.1f}", one.made_again)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lost = (result.broken_s - result.unbroken_s) / max(len(result.seen), 1)
    lines.append(
        f"\nSeed {seed}: {result.unbroken_s:.0f} s without faults, {result.broken_s:.0f} s with {len(result.seen)}: "
        f"throughput kept {result.unbroken_s / result.broken_s:.0%}; {lost:.1f} s lost by a fault.  "
        f"Differences to the unbroken run: {len(result.differences)}."
    )
    return "\n".join(lines) + "\n"


def quickstart_flags(work: Path) -> list[str]:
    """Make the quickstart's models and prompts, if they are not there, and return its flags of the training command."""
    args = quickstart.arguments(["--directory", str(work)])
    world, job = work / "small_world_0", work / "quickstart"
    if not (world / "world.json").is_file():
        words = (sys.executable, "tools/make_small_world.py", "--save", world)
        quickstart.run(quickstart.Part(title="Make the small world", words=words))
    *conversions, training = quickstart.parts(args, world, job)
    for part in conversions:
        if not Path(part.words[part.words.index("--save") + 1]).exists():
            quickstart.run(part)
    words_of_training = [str(word) for word in training.words]
    return words_of_training[words_of_training.index("megatron_tropd.train") + 1 :]


def parser() -> FlagParser:
    """Return the parser of the command."""
    p = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=0, help="of the faults")
    p.add_argument("--steps", type=int, default=200, help="steps of the run")
    p.add_argument("--every", type=int, default=20, help="steps between faults")
    p.add_argument("--save-interval", type=int, default=10, help="steps between checkpoints; at most half of --every")
    p.add_argument(
        "--kinds", nargs="+", choices=sorted(KINDS), default=sorted(KINDS), help="which faults (default: all)"
    )
    p.add_argument(
        "--unbroken", type=Path, metavar="WORK/seed_N_TIME",
        help="folder of an earlier chaos run whose unbroken run is used again",
    )  # fmt: skip
    p.add_argument("--work", type=Path, default=Path("runs/chaos"), help="directory for all files")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 if nothing differs."""
    options = parser().parse_args(argv)
    if not 1 <= options.save_interval <= options.every // 2:
        parser().error(f"--save-interval {options.save_interval} must be from 1 to {options.every // 2}")
    if options.unbroken and not (options.unbroken / "unbroken.json").is_file():  # written last
        parser().error(
            f"--unbroken {options.unbroken}: no unbroken run that came to its end is in it; name the folder "
            "seed_N_TIME that an earlier call made in its --work"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the job too
    work = options.work.resolve()
    common = [*quickstart_flags(work), "--train-iters", str(options.steps), *flags(options.save_interval)]

    def start(run_dir: Path) -> Start:
        return lambda folder, more: Launch([*common, "--run-dir", str(run_dir)], folder, more)

    runs = work / f"seed_{options.seed}_{time.strftime('%Y%m%d_%H%M%S')}"
    try:
        result = chaos(
            start, runs, seed=options.seed, steps=options.steps, every=options.every,
            save_interval=options.save_interval, kinds=options.kinds, unbroken=options.unbroken,
        )  # fmt: skip
    except ChaosError as error:
        print(f"chaos: {error}\nthe runs and their output are in {runs}", file=sys.stderr)
        return 1
    print(f"\n{table(result, options.seed)}")
    for text in result.differences:
        print(f"DIFFERS: {text}")
    return 1 if result.differences else 0


if __name__ == "__main__":
    sys.exit(main())
