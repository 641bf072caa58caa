"""Measure what the guards of a run cost, and count their alarms in a clean run.

    python tools/measure_guards.py --work runs/guards [--steps 200] [--pairs 3]     # cost
    python tools/measure_guards.py --work runs/guards --clean 1000                  # false alarms

The quickstart's student is trained on two ranks of this machine's CPU.  The first command makes pairs of runs, one with
all guards and one without those that can be switched off, and one more run in which every call of a guard is measured.
On a machine that does other things too, only CPU times and the last table say much.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_tropd.flag_parser import FlagParser
from megatron_tropd.reporting.records import of_kind, read_records
from tools.faults.chaos import Launch, quickstart_flags
from tools.guard_costs.timed_train import PLACES, VARIABLE

GUARDS_OFF = [
    "--rank-heartbeat-timeout", "0", "--hang-timeout-minutes", "0", "--heartbeat-interval", "0",
    "--no-rerun-on-nonfinite", "--no-keep-unfinished-rollouts",
]  # fmt: skip
COMMON = ["--save-interval", "0", "--eval-interval", "0", "--rollout-log-interval", "0"]
CLEAN = ["--save-interval", "100", "--rollout-batch-size", "4", "--n-samples-per-prompt", "2", "--eval-interval", "0"]
"""Smaller batches, and no evaluations between the first and the last step."""
STRICT = ["--rank-heartbeat-timeout", "30", "--hang-timeout-minutes", "2", "--heartbeat-interval", "1"]
"""Deadlines of a clean run, shorter than the defaults."""
REALISTIC_STEP_S = 60.0
_WARM_UP = 5
_ALARM = re.compile(r"^.*(?:warning: |Hang: |error|Error|silent|transient|persistent|skipped).*$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Of one run."""

    step_s: float
    """Median of a step, on the clock."""
    step_cpu_s: float
    """Median of a step, CPU time of both ranks."""
    steps: int
    calls: Sequence[Mapping[str, Sequence[Sequence[float]]]]
    """By rank and guard: seconds on the clock and of CPU time, of every call."""


def train(flags: Sequence[str], folder: Path, *, guards: bool) -> Measured:
    """Train once with ranks that measure themselves.

    Raises:
        RuntimeError: the run failed.
    """
    folder.mkdir(parents=True)
    more = {VARIABLE: json.dumps({"folder": str(folder), "guards": guards})}
    words = [*flags, "--run-dir", str(folder / "run")]
    launch = Launch(words, folder, more, module="tools.guard_costs.timed_train")
    if code := launch.wait(timeout=3600):
        raise RuntimeError(f"a run ended with {code}; the end of {folder / 'log'}:\n{launch.output[-3000:]}")
    ranks = [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]

    def medians(clock: str) -> list[float]:
        times = [[step[clock] for step in rank["steps"]][_WARM_UP:] for rank in ranks]
        return [statistics.median(b - a for a, b in itertools.pairwise(one)) for one in times]

    return Measured(
        step_s=max(medians("wall")), step_cpu_s=sum(medians("cpu")), steps=len(ranks[0]["steps"]),
        calls=[rank["calls"] for rank in ranks],
    )  # fmt: skip


def costs(measured: Measured) -> str:
    """Return a table of what each guard took; of both ranks the one that it took more of."""
    lines = [
        "| guard | calls per step | CPU time per step, ms | on the clock per step, ms | CPU time, share of this step "
        f"| of a step of {REALISTIC_STEP_S:.0f} s |",
        "|---|---|---|---|---|---|",
    ]
    cpu_of_rank = measured.step_cpu_s / len(measured.calls)
    total = 0.0
    for name in PLACES:
        calls = max((rank.get(name, []) for rank in measured.calls), key=lambda of: sum(cpu for _, cpu in of))
        wall, cpu = (sum(call[at] for call in calls) / measured.steps for at in (0, 1))
        total += 0.0 if "in the line above" in name else cpu
        lines.append(
            f"| {name} | {len(calls) / measured.steps:.2f} | {1e3 * cpu:.3f} | {1e3 * wall:.3f} | "
            f"{cpu / cpu_of_rank:.2%} | {cpu / REALISTIC_STEP_S:.4%} |"
        )
    lines.append(f"| all | | {1e3 * total:.3f} | | {total / cpu_of_rank:.2%} | {total / REALISTIC_STEP_S:.4%} |")
    return "\n".join(lines)


def compare(flags: Sequence[str], work: Path, *, steps: int, pairs: int) -> None:
    """Make the runs and print their tables."""
    length = ["--train-iters", str(steps), *COMMON]
    found: dict[str, list[Measured]] = {"with all guards": [], "without": []}
    for pair in range(pairs):
        for name in sorted(found, reverse=bool(pair % 2)):  # a machine that gets slower favours neither
            extra = [] if name == "with all guards" else GUARDS_OFF
            folder = work / f"pair_{pair}_{name.replace(' ', '_')}"
            found[name].append(train([*flags, *length, *extra], folder, guards=False))
            print(f"{name}: {found[name][-1].step_s:.3f} s a step, CPU {found[name][-1].step_cpu_s:.3f} s", flush=True)
    print("\n| runs | step on the clock, s: median (all) | CPU time of a step, both ranks, s: median (all) |")
    print("|---|---|---|")
    for name, runs in found.items():
        cells = []
        for values in ([run.step_s for run in runs], [run.step_cpu_s for run in runs]):
            cells.append(f"{statistics.median(values):.4f} ({', '.join(f'{value:.4f}' for value in values)})")
        print(f"| {name} | {' | '.join(cells)} |")
    measured = train([*flags, *length], work / "measured_calls", guards=True)
    print(f"\nstep of the next table: {measured.step_s:.3f} s, CPU {measured.step_cpu_s / 2:.3f} s a rank\n")
    print(costs(measured))


def alarms(folder: Path, output: str) -> list[str]:
    """Return every alarm of a run: lines of its output, steps that were not made as usual, stacks of a hang."""
    found = [line for line in _ALARM.findall(output) if "accuracy" not in line]
    for record in of_kind(read_records(folder / "run" / "metrics.jsonl"), "step"):
        guards: dict[str, Any] = {name: value for name, value in record["metrics"].items() if name.startswith("guard/")}
        if record["verdict"] != "stepped" or guards:
            found.append(f"step {record['step']}: {record['verdict']}, {guards}")
    return found + [str(path) for path in sorted((folder / "run").glob("hang_*"))]


def clean(flags: Sequence[str], folder: Path, steps: int) -> int:
    """Make a run in which nothing is caused, and print its alarms; returns how many there are."""
    folder.mkdir(parents=True)
    words = [*flags, *CLEAN, *STRICT, "--train-iters", str(steps), "--run-dir", str(folder / "run")]
    began_s = time.monotonic()
    launch = Launch(words, folder, {}, module="megatron_tropd.train")
    code = launch.wait(timeout=7200)
    found = alarms(folder, launch.output) + ([f"torchrun ended with {code}"] if code else [])
    made = len(of_kind(read_records(folder / "run" / "metrics.jsonl"), "step"))
    print(f"{made} steps in {time.monotonic() - began_s:.0f} s, alarms: {len(found)}")
    print("".join(f"  {line}\n" for line in found), end="")
    return len(found)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 1 if a clean run had an alarm."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/guards"), help="directory for all files")
    parser.add_argument("--steps", type=int, default=200, help="steps of a run that is measured")
    parser.add_argument("--pairs", type=int, default=3, help="runs with guards, and runs without")
    parser.add_argument("--clean", type=int, default=0, help="instead, count the alarms in so many steps")
    options = parser.parse_args(argv)
    work = options.work.resolve()
    flags = quickstart_flags(work)
    runs = work / time.strftime("%Y%m%d_%H%M%S")
    if options.clean:
        return 1 if clean(flags, runs, options.clean) else 0
    compare(flags, runs, steps=options.steps, pairs=options.pairs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
