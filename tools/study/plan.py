"""What is run: the cells of the study, and the flags of each.

A cell is one run of the training command.  All methods of a world, learning rate and length have the same flags but
for those of the method itself: nothing was tuned for one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from tools.study.methods import METHODS, Flags

SEEDS = 5
MAIN_WORLDS = ("B4", "H4", "H4f")
WARNING_WORLD = "U"
LR, HARSH_LR = 1e-3, 3e-3
STEPS, LONG_STEPS = 100, 200
HARSH_METHODS = ("opd", "fkl", "jsd", "clip_outlier", "fkl_outlier", "tropd_floor", "clip_fkl")
LONG_METHODS = ("opd", "fkl", "fkl_outlier", "tropd", "tropd_floor", "clip_fkl")
WARNING_METHODS = ("opd", "jsd", "fkl_outlier", "tropd_floor", "clip_fkl")
SUBSET_METHODS = ("opd", "fkl", "clip_outlier", "fkl_outlier", "tropd_floor")

SHARED_FLAGS: Flags = {
    "train-iters": str(STEPS),
    "lr": str(LR),
    "weight-decay": "0",
    "clip-grad": "1",
    "rollout-batch-size": "16",
    "n-samples-per-prompt": "4",
    "max-prompt-length": "32",
    "max-response-length": "40",
    "max-tokens-per-microbatch": "8192",
    "rollout-max-batch-size": "512",
    "make-vocab-size-divisible-by": "8",
    "top-k": "4",
    "outlier-threshold": "-2",
    "reward-floor": "-2",
    "answer-pattern": r"#\s*(.*)$",
    "grader": "exact",
    "eval-num-samples": "2",
    "log-interval": "50",
    "heartbeat-interval": "0",
    "rollout-log-interval": "0",
}
"""Of every cell; what is not here is the default of the training command, such as AdamW(0.9, 0.999)."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Cell:
    """One run."""

    seed: int
    """Of the world's problems, both networks' weights and lessons, and the run."""
    world: str
    steps: int
    lr: float
    method: str

    @property
    def name(self) -> str:
        """For files and messages."""
        return f"{self.world}-{self.method}-lr{self.lr:g}-{self.steps}steps-seed{self.seed}"

    @property
    def own_flags(self) -> dict[str, str]:
        """The flags that differ from ``SHARED_FLAGS``, without seed and paths."""
        flags = dict(METHODS[self.method].flags)
        for name, value in (("lr", str(self.lr)), ("train-iters", str(self.steps))):
            if SHARED_FLAGS[name] != value:
                flags[name] = value
        return flags


@dataclass(frozen=True, slots=True, kw_only=True)
class CellFiles:
    """Where a cell finds what it reads."""

    student: Path
    teacher: Path
    train: Path
    held_out: Path
    token_cache: Path


def training_flags(cell: Cell, files: CellFiles, run_dir: Path) -> list[str]:
    """The words after ``python -m megatron_tropd.train``."""
    flags = {
        **SHARED_FLAGS,
        **cell.own_flags,
        "seed": str(cell.seed),
        "hf-checkpoint": str(files.student),
        "teacher-hf-checkpoint": str(files.teacher),
        "prompt-data": str(files.train),
        "eval-data": str(files.held_out),
        "data-cache-path": str(files.token_cache),
        "run-dir": str(run_dir),
    }
    return [f"--{name}={value}" for name, value in flags.items()]  # "=": a value may begin with a minus


def _groups(seed: int) -> Iterator[Cell]:
    for world in MAIN_WORLDS:
        for method in METHODS:
            yield Cell(world=world, method=method, lr=LR, steps=STEPS, seed=seed)
    for method in HARSH_METHODS:
        yield Cell(world="B4", method=method, lr=HARSH_LR, steps=STEPS, seed=seed)
    for method in LONG_METHODS:
        yield Cell(world="B4", method=method, lr=LR, steps=LONG_STEPS, seed=seed)


def full_plan(seeds: int = SEEDS, *, warning_world: bool = False) -> list[Cell]:
    """All cells, seed by seed, so that what is done at any moment is a study of fewer seeds.

    Args:
        seeds: how many; they are 0, 1, ...
        warning_world: also the world that shows where these methods fail, which is not part of the study.
    """
    cells = [cell for seed in range(seeds) for cell in _groups(seed)]
    if warning_world:
        cells += [
            Cell(world=WARNING_WORLD, method=method, lr=LR, steps=STEPS, seed=seed)
            for seed in range(seeds)
            for method in WARNING_METHODS
        ]
    return cells


def subset_plan() -> list[Cell]:
    """A selection that shows the study's main result in minutes: some methods, two seeds."""
    return select(full_plan(2), methods=SUBSET_METHODS, lrs=[LR], steps=[STEPS])


def select(
    cells: Collection[Cell], *, worlds: Collection[str] = (), methods: Collection[str] = (),
    lrs: Collection[float] = (), steps: Collection[int] = (),
) -> list[Cell]:  # fmt: skip
    """Those cells that have one of the values of each list; an empty list admits all."""
    return [
        cell
        for cell in cells
        if (not worlds or cell.world in worlds)
        and (not methods or cell.method in methods)
        and (not lrs or cell.lr in lrs)
        and (not steps or cell.steps in steps)
    ]
