"""A run directory as the tools that make tables and pages read it: what is damaged is told, and the rest is used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_tropd.reporting.records import Record, eval_scalars, of_kind, scan_records, step_scalars
from megatron_tropd.reporting.report.plots import standard_error

METRICS, CONFIG, ENVIRONMENT = "metrics.jsonl", "config.yaml", "env.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run directory says."""

    path: Path
    records: tuple[Record, ...]
    """Its steps and evaluations."""
    config: dict[str, Any]
    """Flag with dashes -> value; empty where it is not known."""
    environment: dict[str, Any]
    problems: tuple[str, ...]
    """What could not be used, each with its file."""

    @property
    def last_step(self) -> int:
        """The last step that was trained, or 0."""
        steps = of_kind(self.records, "step")
        return int(steps[-1]["step"]) if steps else 0

    @property
    def planned_steps(self) -> int | None:
        """--train-iters; None where it is not known."""
        value = self.config.get("train-iters")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def unfinished(self) -> str:
        """``step 3 of 200`` where the run has not trained all its steps, else an empty string."""
        planned = self.planned_steps
        return f"step {self.last_step} of {planned}" if planned is not None and self.last_step < planned else ""

    def final_evaluations(self) -> dict[str, Record]:
        """Way of decoding -> its last evaluation."""
        return {record["decoding"]: record for record in of_kind(self.records, "eval")}


def is_run(path: Path) -> bool:
    """Whether a directory has a file that only a run writes."""
    return (path / METRICS).is_file() or ((path / CONFIG).is_file() and (path / ENVIRONMENT).is_file())


def read_run(path: Path) -> Run:
    """Read a run directory; whatever part of it is damaged is left out and told.

    Raises:
        ValueError: the directory is no run.
    """
    if not is_run(path):
        what = "has no metrics.jsonl" if path.is_dir() else "is no directory" if path.exists() else "does not exist"
        raise ValueError(
            f"{path} {what}; expected a run directory, as --run-dir of a training run "
            "makes it (metrics.jsonl, config.yaml, env.json)"
        )
    problems: list[str] = []
    config = _object(path / CONFIG, yaml.safe_load, problems)
    return Run(
        path=path,
        records=tuple(_records(path / METRICS, problems)),
        config={str(name).replace("_", "-"): value for name, value in config.items()},
        environment=_object(path / ENVIRONMENT, json.loads, problems),
        problems=tuple(problems),
    )


def _records(path: Path, problems: list[str]) -> list[Record]:
    records, damaged = scan_records(path, _is_whole)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        what = "line" if len(damaged) == 1 else "lines"
        problems.append(f"{path}: {len(damaged)} damaged {what} left out ({shown})")
    return records


def _is_whole(record: Record) -> bool:
    """Whether a record has what tables and curves are made of."""
    try:
        if record["kind"] == "step":
            return bool(step_scalars(record)) and isinstance(record["verdict"], str)
        if record["kind"] == "eval":
            shares = [record, *(record.get("domains") or {}).values()]
            numbers = [(float(share["accuracy"]), standard_error(share)) for share in shares]
            counted = all(share["num_prompts"] > 0 for share in shares)
            return bool(numbers and eval_scalars(record)) and counted and isinstance(record["decoding"], str)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
    return False


def _object(path: Path, parse: Any, problems: list[str]) -> dict[str, Any]:
    """The mapping in a file; an empty one where there is none, told where it cannot be read."""
    if not path.is_file():
        return {}
    try:
        value = parse(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        problems.append(f"{path} cannot be read and is left out: {str(error).splitlines()[0]}")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{path} holds no mapping and is left out")
        return {}
    return value
