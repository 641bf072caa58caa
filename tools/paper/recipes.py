"""The paper's settings and rows as flags: ``examples/paper/rows.yaml``, and the files of flags that it names.

A recipe is a file for ``--config``: a setting, the flags of a row, and with a small world what a smoke run replaces.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_tropd.plain_yaml import Value, Word, read_plain_yaml

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "examples" / "paper"
_ONLY_SERVERS = "sglang-"
"""Flags that are left out of a smoke run, which has no servers."""


class RecipeError(ValueError):
    """What was asked for cannot be made; the message says which names there are, or which flag is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A file of flags, and how its models are evaluated."""

    name: str
    benchmarks: tuple[str, ...]
    """() for a step on the way to a setting."""
    paper_setting: str
    """What ``--paper-setting`` of the benchmark command calls it; "" for a step on the way."""

    @property
    def file(self) -> Path:
        """Its flags."""
        return PAPER / "settings" / f"{self.name}.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A method, or a model that is evaluated as it is."""

    name: str
    flags: Mapping[str, str]
    """The trainer's flags, without dashes."""
    evaluates: str
    """``student`` or ``teacher``: that model is evaluated, nothing is trained; else ""."""
    reading_of: str
    """The row that this is another reading of; else ""."""
    note: str
    """How it reads that row."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Place:
    """A line of a table."""

    table: str
    setting: Setting
    row: Row
    title: str
    """As the paper prints it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """All that ``rows.yaml`` says."""

    settings: Mapping[str, Setting]
    rows: Mapping[str, Row]
    printed: tuple[Place, ...]
    """Every line of every table, in the paper's order."""

    def of(self, table: str, *, readings: bool = False) -> list[Place]:
        """Return the lines of ``table``, each followed by its other readings if ``readings``.

        Raises:
            RecipeError: there is no such table.
        """
        known = dict.fromkeys(place.table for place in self.printed)
        if table not in known:
            raise RecipeError(f"table {table!r} has no results; choose one of {', '.join(known)}")
        lines = [place for place in self.printed if place.table == table]
        return [one for line in lines for one in (line, *(self._other_readings(line) if readings else ()))]

    def _other_readings(self, line: Place) -> Iterator[Place]:
        for row in self.rows.values():
            if row.reading_of == line.row.name:
                title = f"{line.title} ({row.note})"
                yield Place(table=line.table, setting=line.setting, row=row, title=title)


def read_tables(path: Path = PAPER / "rows.yaml") -> Tables:
    """Read ``rows.yaml``."""
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings = {
        name: Setting(
            name=name, benchmarks=tuple(value.get("benchmarks", ())), paper_setting=value.get("paper_setting", "")
        )
        for name, value in content["settings"].items()
    }
    rows = {
        name: Row(
            name=name, flags={flag: str(given) for flag, given in value.get("flags", {}).items()},
            evaluates=value.get("evaluates", ""), reading_of=value.get("reading_of", ""), note=value.get("note", ""),
        )
        for name, value in content["rows"].items()
    }  # fmt: skip
    printed = tuple(
        Place(table=str(table), setting=settings[setting], row=rows[row], title=title)
        for table, halves in content["tables"].items()
        for setting, titles in halves.items()
        for row, title in titles.items()
    )
    return Tables(settings=settings, rows=rows, printed=printed)


def recipe(
    tables: Tables, setting: str, row: str = "", small_world: Path | None = None, more: Mapping[str, str] | None = None
) -> dict[str, Value]:
    """Return flags by name: of ``setting``, ``row``, a smoke run in ``small_world``, and ``more``; later ones win.

    Raises:
        RecipeError: there is no such setting or row, or the two do not go together.
    """
    if setting not in tables.settings:
        raise RecipeError(f"--setting {setting!r}: choose one of {', '.join(tables.settings)}")
    methods = [name for name, one in tables.rows.items() if not one.evaluates]
    has_rows = bool(tables.settings[setting].benchmarks)
    if has_rows and row not in methods:
        raise RecipeError(f"--row {row!r}: choose one of {', '.join(methods)}")
    if row and not has_rows:
        raise RecipeError(f"--row {row}: --setting {setting} has a method of its own; leave out --row")
    flags = read_plain_yaml(tables.settings[setting].file)
    if row:
        flags |= _words(tables.rows[row].flags)
    if small_world is not None:
        flags = {name: value for name, value in flags.items() if not name.startswith(_ONLY_SERVERS)}
        flags |= read_plain_yaml(PAPER / "smoke.yaml") | _words(_small_models(flags, small_world))
    return flags | _words(more or {})


def _small_models(flags: Mapping[str, Value], world: Path) -> dict[str, str]:
    """Return the flags of a smoke run that name files."""
    found = {
        "hf-checkpoint": str(world / "student"),
        "prompt-data": str(world / "train.jsonl"),
        "eval-data": str(world / "eval.jsonl"),
    }
    if "teacher-hf-checkpoint" in flags:
        found["teacher-hf-checkpoint"] = str(world / "teacher")
    return found


def _words(flags: Mapping[str, str]) -> dict[str, Value]:
    return {name: Word(text, quoted=True) for name, text in flags.items()}


def as_yaml(flags: Mapping[str, Value], comments: Sequence[str] = ()) -> str:
    """Return a file for ``--config``."""
    lines = [
        *(f"# {comment}" for comment in comments),
        *(f"{name}: {_as_yaml(value)}" for name, value in flags.items()),
    ]
    return "\n".join(lines) + "\n"


def _as_yaml(value: Value) -> str:
    if isinstance(value, Word):
        return json.dumps(value.text) if value.quoted else value.text
    return f"[{', '.join(_as_yaml(word) for word in value)}]"
