"""All flags of every setting and row, defaults included, as ``tests/golden/paper`` keeps them."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_tropd.cli import parse, to_flags
from megatron_tropd.config import TrainConfig
from tools.paper.recipes import Tables, as_yaml, recipe

HEAD = "# All flags of a setting's first row; `rows`: what others have instead.  Written by tools/paper_recipe.py.\n"


def configuration(
    tables: Tables, setting: str, row: str = "", small_world: Path | None = None, *flags: str,
    more: Mapping[str, str] | None = None,
) -> TrainConfig:  # fmt: skip
    """Return the configuration of a recipe with ``more`` (:func:`recipe`), and the trainer's ``flags`` behind it.

    Raises:
        RecipeError: there is no such setting or row.
        ConfigError: the trainer would refuse its flags.
    """
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "recipe.yaml")
        file.write_text(as_yaml(recipe(tables, setting, row, small_world, more)), encoding="utf-8")
        return parse(["--config", str(file), *flags])


def methods_of(tables: Tables, setting: str) -> list[str]:
    """Return the rows that can be trained in ``setting``; those of a step on the way to one are [""]."""
    if not tables.settings[setting].benchmarks:
        return [""]
    return [name for name, row in tables.rows.items() if not row.evaluates]


def resolved_flags(tables: Tables, setting: str, row: str) -> dict[str, Any]:
    """Return every flag of a recipe by name; how prefixes are cut is as the method has it, not ``auto``."""
    config = configuration(tables, setting, row)
    return {**to_flags(config), "guidance": config.guidance.mode, "guidance-steps": config.guidance.steps}


def resolved_setting(tables: Tables, setting: str) -> dict[str, Any]:
    """Return what the file of a setting holds: all flags of its first row, and what the other rows have instead."""
    first, *others = methods_of(tables, setting)
    common = resolved_flags(tables, setting, first)
    rows = {row: _changed(common, resolved_flags(tables, setting, row)) for row in others}
    return {**common, "rows": rows} if rows else common


def _changed(common: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if common.get(name) != value}


def write_resolved(tables: Tables, directory: Path) -> None:
    """Write one file for each setting."""
    directory.mkdir(parents=True, exist_ok=True)
    for setting in tables.settings:
        text = yaml.safe_dump(resolved_setting(tables, setting), width=120, default_flow_style=None)
        (directory / f"{setting}.yaml").write_text(HEAD + text, encoding="utf-8")
