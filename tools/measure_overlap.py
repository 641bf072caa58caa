"""Measure what a pipelined step saves, with a real SGLang server and real training runs, on a machine without a GPU.

    python tools/measure_overlap.py --sglang-python .venv-sglang/bin/python --directory runs/overlap

First one run shows what generation, scoring and training cost here.  Then two comparisons follow:

- a teacher on the student's ranks and on a rank of its own, with a teacher whose scoring costs as much as generation;
- --rollout-lag 0 and 1, with prompts so long that training costs as much as generation.

Two cores are needed: the server has one, the trainer or the teacher the other.  The exit code is 1 if a comparison is
above its limit, which says that parts of a step waited for each other.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_tropd.flag_parser import FlagParser  # noqa: E402
from megatron_tropd.sglang.server.process import ServerProcess  # noqa: E402
from megatron_tropd.sglang.settings import SGLangSettings  # noqa: E402
from tools.overlap.runs import Seconds, train  # noqa: E402
from tools.overlap.world import Costs, make_world  # noqa: E402

_PROMPTS, _SAMPLES, _RESPONSE = 32, 2, 48
_STEPS = 8
_RUNNING = 8
"""Responses in writing at one time: scoring can begin when the first of so many are finished."""
_FLAGS = [
    "--rollout-batch-size", str(_PROMPTS), "--n-samples-per-prompt", str(_SAMPLES), "--max-response-length",
    str(_RESPONSE), "--max-prompt-length", "2048", "--max-tokens-per-microbatch", "4096", "--lr", "1e-6",
    "--save-interval", "0", "--on-parity", "warn", "--on-spike", "warn",
]  # fmt: skip
_COLUMNS = ("step", "generate", "score", "train", "push", "teacher_wait", "teacher_busy", "engine_idle")


class Bench:
    """One server and the runs on it."""

    def __init__(self, directory: Path, sglang_python: Path) -> None:
        self.directory = directory
        self._worlds: dict[Costs, Path] = {}
        student = self.world(Costs(teacher_layers=4, prompt_words=32)) / "student"
        settings = SGLangSettings(
            hf_dir=student, log_dir=directory / "server", dtype="float32", python=sglang_python,
            flags=("--max-running-requests", str(_RUNNING)),
        )  # fmt: skip
        # Two threads that wait for each other would take the other core too, from the process that works there.
        os.environ["OMP_NUM_THREADS"] = "1"
        self.server = ServerProcess(settings, 0, 4096)
        self.server.start()

    def world(self, costs: Costs) -> Path:
        """Models and prompts of these costs, made once; the student is the same in all."""
        if costs not in self._worlds:
            root = self.directory / f"world-{costs.teacher_layers}-{costs.prompt_words}"
            self._worlds[costs] = make_world(root, costs, num_prompts=4 * _PROMPTS)
        return self._worlds[costs]

    def run(self, name: str, costs: Costs, *flags: str, ranks: int = 1) -> Seconds:
        """Train, print and return the seconds of a step."""
        found = train(
            self.world(costs), self.directory / name.replace(" ", "-"), self.server.url, ranks=ranks, steps=_STEPS,
            flags=[*_FLAGS, *flags],
        )  # fmt: skip
        cells = [asdict(found)[column] for column in _COLUMNS]
        print(f"| {name} | " + " | ".join("" if v is None else f"{v:.2f}" for v in cells) + " |", flush=True)
        return found


def compare(bench: Bench) -> dict[str, dict[str, Seconds]]:
    """Make all runs; return them by comparison and name."""
    costs = Costs(teacher_layers=4, prompt_words=32)
    first = bench.run("first look", costs)
    layers = max(1, round(costs.teacher_layers * first.generate / first.score))
    scoring = replace(costs, teacher_layers=layers)
    dedicated = ("--teacher-placement", "dedicated", "--teacher-world-size", "1")
    tokens = costs.prompt_words + _RESPONSE
    words = min(max(8, round(tokens * first.generate / first.train) - _RESPONSE), 1500)
    training = Costs(teacher_layers=1, prompt_words=words)
    return {
        "dedicated": {
            "colocated": bench.run("teacher colocated", scoring),
            "dedicated": bench.run("teacher dedicated", scoring, *dedicated, ranks=2),
        },
        "lag": {
            "lag 0": bench.run("lag 0", training),
            "lag 1": bench.run("lag 1", training, "--rollout-lag", "1"),
        },
    }


def main() -> int:
    """Run the command; return its exit code."""
    flags = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--directory", type=Path, default=Path("runs/overlap"), help="where everything is written")
    flags.add_argument("--sglang-python", type=Path, default=Path(".venv-sglang/bin/python"))
    flags.add_argument("--dedicated-limit", type=float, default=0.8, help="most step time, as a share of colocated")
    flags.add_argument("--lag-limit", type=float, default=0.7, help="most step time of lag 1, as a share of lag 0")
    flags.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = flags.parse_args()
    print("medians of a step in seconds (busy and idle: shares)\n")
    print("| run | " + " | ".join(_COLUMNS) + " |\n" + "|---" * (len(_COLUMNS) + 1) + "|")
    bench = Bench(args.directory.absolute(), args.sglang_python.absolute())
    try:
        found = compare(bench)
    finally:
        bench.server.stop()
    good = True
    for name, limit in (("dedicated", args.dedicated_limit), ("lag", args.lag_limit)):
        before, after = found[name].values()
        ratio = after.step / before.step
        good &= ratio <= limit
        print(f"\n{' / '.join(reversed(found[name]))}: {ratio:.2f} of the step time; limit {limit:g}", end="")
    print()
    if args.json:
        args.json.write_text(json.dumps({n: {k: asdict(v) for k, v in runs.items()} for n, runs in found.items()}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
