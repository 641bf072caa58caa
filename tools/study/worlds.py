"""The worlds of the study: which teacher and which student, made once and kept by their description.

A network and, of a teacher, the prompts with its responses stand in one directory, named after a digest of
everything they are made from.  Worlds that share a network share the directory.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.small_world.arithmetic import Style
from tools.small_world.build import WorldSpec, make_network, make_teacher_side
from tools.small_world.pretraining import STUDENT, TEACHER, Recipe
from tools.study.plan import SHARED_FLAGS, Cell, CellFiles

FACTS = "facts.json"
"""Written last: where it is, the directory is complete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A teacher and a student.  Every seed trains both anew."""

    teacher: Recipe
    student: Recipe
    num_train_prompts: int = 1600
    num_eval_prompts: int = 512


_FILLED = replace(STUDENT, style=Style(p_filler=0.4))
_NOISY = Style(
    p_terse=0.4,
    p_dirty=1.0,
    p_wrong=0.03,
    wrong_taught=True,
    connective_weights=(0.1, 0.1, 0.1, 0.1, *[0.075] * 8),
    p_filler=0.08,
)

WORLDS: dict[str, World] = {
    # the quickstart's world
    "B4": World(teacher=TEACHER, student=STUDENT),
    # the student's lessons have fillers; the teacher's too, as context that is not taught
    "H4": World(teacher=replace(TEACHER, style=Style(p_filler=0.15, fillers_taught=False)), student=_FILLED),
    # the same student, and a teacher that has never seen a filler
    "H4f": World(teacher=TEACHER, student=_FILLED),
    # a student that knows the task and is noisy, and a teacher that has seen its own style alone
    "U": World(
        teacher=replace(TEACHER, style=Style(p_terse=0.0, p_switch=0.0, p_dirty=0.0)),
        student=replace(STUDENT, style=_NOISY, stop_accuracy=0.75),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """One network to make."""

    recipe: Recipe
    seed: int
    num_train_prompts: int
    num_eval_prompts: int

    @property
    def name(self) -> str:
        """Its directory: the role, the seed, and a digest of the description and of the packages that matter."""
        described = {**asdict(self), "versions": [version("torch"), version("transformers")]}
        return f"{self.recipe.name}-seed{self.seed}-{_digest(described)}"

    def is_made(self, directory: Path) -> bool:
        """Whether it is complete in ``directory``."""
        return (directory / self.name / FACTS).is_file()


def networks_of(world: str, seed: int) -> tuple[Network, Network]:
    """Teacher and student of a world."""
    of = WORLDS[world]
    teacher, student = (
        Network(recipe=recipe, seed=seed, num_train_prompts=of.num_train_prompts, num_eval_prompts=of.num_eval_prompts)
        for recipe in (of.teacher, of.student)
    )
    return teacher, student


def networks(cells: Iterable[Cell]) -> list[Network]:
    """Every network that the cells need, once, in their order."""
    return list(dict.fromkeys(network for cell in cells for network in networks_of(cell.world, cell.seed)))


def files_of(cell: Cell, directory: Path) -> CellFiles:
    """Where the files of a cell's world are."""
    teacher, student = (directory / network.name for network in networks_of(cell.world, cell.seed))
    return CellFiles(
        student=student / "student",
        teacher=teacher / "teacher",
        train=teacher / "train.jsonl",
        held_out=teacher / "eval.jsonl",
        token_cache=directory / "tokens",
    )


def settings_of(cell: Cell) -> str:
    """Digest of all that a cell is made from, but for paths and versions: with another one it is another cell."""
    flags = {**SHARED_FLAGS, **cell.own_flags, "seed": str(cell.seed)}
    return _digest({"flags": flags, "world": asdict(WORLDS[cell.world])})


def _digest(described: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]


def make(network: Network, directory: Path) -> dict[str, Any]:
    """Train a network, save it in ``directory`` and return how good it is; what is there unfinished is removed."""
    place = directory / network.name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    spec = WorldSpec(
        save=place,
        seed=network.seed,
        num_train_prompts=network.num_train_prompts,
        num_eval_prompts=network.num_eval_prompts,
    )
    if network.recipe.name == TEACHER.name:
        facts = make_teacher_side(replace(spec, teacher=network.recipe))
    else:
        facts = make_network(spec, network.recipe)
    (place / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts
