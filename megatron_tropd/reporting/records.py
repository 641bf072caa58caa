"""Converts reports to JSON lines and back.

A record is what one line of ``metrics.jsonl`` parses to.  JSON has no NaN and no infinity: such a number is written
as null, with a note under ``nonfinite`` that names the number, and is restored when the line is read.

Example:
    {"kind": "step", "step": 3, "loss": null, ..., "nonfinite": {"loss": "nan"}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tropd.atomic_files import write_text
from megatron_tropd.reports import EvalReport, StepReport

Record = dict[str, Any]


def step_record(report: StepReport) -> Record:
    """The record of one training step."""
    return {"kind": "step", **asdict(report)}


def eval_record(report: EvalReport) -> Record:
    """The record of one evaluation."""
    return {"kind": "eval", **asdict(report)}


def encode(record: Mapping[str, Any]) -> str:
    """One line of valid JSON, without its newline."""
    notes: dict[str, str] = {}
    clean = _without_nonfinite(record, "", notes)
    if notes:
        clean["nonfinite"] = notes
    return json.dumps(clean, allow_nan=False, separators=(", ", ": "))


def decode(line: str) -> Record:
    """The record of one line; ``ValueError`` where the line is not a JSON object."""
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"a line of metrics holds a {type(record).__name__}, expected an object")
    for path, text in record.pop("nonfinite", {}).items():
        # Only the first separator splits: metric names may hold dots of their own.
        group, _, name = path.partition(".")
        target = record.get(group) if name else record
        if isinstance(target, dict):
            target[name or group] = float(text)
    return record


def _without_nonfinite(value: Any, path: str, notes: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(item, f"{path}.{key}" if path else key, notes) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(item, f"{path}.{index}", notes) for index, item in enumerate(value)]
    if value is None or isinstance(value, str | int):
        return value
    number = float(value)  # a float, or a number of numpy or torch
    if math.isfinite(number):
        return number
    notes[path] = str(number)
    return None


def read_records(path: Path) -> list[Record]:
    """All complete records of a metrics file, in order, each step and evaluation once (the last one counts).

    A line that holds none was cut off by a crash and is left out.
    """
    return scan_records(path)[0]


def scan_records(path: Path, is_whole: Callable[[Record], bool] = bool) -> tuple[list[Record], list[int]]:
    """Read a metrics file, and tell what of it is damaged.

    Args:
        path: the file; without it there are no records.
        is_whole: whether a record has what the caller needs of it; by default, kind and step are enough.

    Returns:
        Records as :func:`read_records` orders them, and the numbers, from 1, of the lines that were left out.
    """
    if not path.exists():
        return [], []
    unique: dict[tuple[Any, ...], Record] = {}
    damaged = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        record = _record(line)
        if record is None or not is_whole(record):
            damaged.append(number)
            continue
        key = (record["kind"], record["step"], record.get("decoding"))
        unique.pop(key, None)
        unique[key] = record
    return list(unique.values()), damaged


def _record(line: str) -> Record | None:
    """What a line records; None where it is cut off, or does not say of which kind and step it is."""
    try:
        record = decode(line)
    except (ValueError, AttributeError, TypeError, RecursionError):  # also of a damaged ``nonfinite``
        return None
    texts = (record.get("kind"), record.get("decoding", ""))
    return record if isinstance(record.get("step"), int) and all(isinstance(text, str) for text in texts) else None


def drop_after(path: Path, step: int | None) -> int:
    """Keep the complete lines up to ``step`` (for None, all of them), atomically; returns how many were dropped."""
    if not path.exists():
        return 0
    before = path.read_bytes()
    # A last line without a newline is complete only if it parses, which the filter below checks.
    lines = before.decode("utf-8", errors="replace").removesuffix("\n").split("\n") if before else []
    kept = [line for line in lines if _keeps(line, step)]
    after = "".join(f"{line}\n" for line in kept)
    if after.encode() != before:
        write_text(path, after)
    return len(lines) - len(kept)


def _keeps(line: str, step: int | None) -> bool:
    record = _record(line)
    return record is not None and (step is None or record["step"] <= step)


def step_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """A step record as flat ``group/name`` numbers (``docs/metrics.md``)."""
    scalars = {f"train/{name}": float(record[name]) for name in ("loss", "grad_norm", "learning_rate")}
    scalars |= {f"tokens/{region}": float(count) for region, count in record["tokens"].items()}
    scalars |= {f"time/{phase}": float(seconds) for phase, seconds in record["seconds"].items()}
    return scalars | {name: float(value) for name, value in record["metrics"].items()}


def eval_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """An evaluation record as flat numbers: ``eval/<decoding>/accuracy`` and so on; of a domain
    ``eval/<decoding>/<domain>/accuracy``.  Records of version 0.2 have neither standard errors nor domains."""
    group = f"eval/{record['decoding']}"
    scalars = {
        f"{group}/{name}": float(record[name])
        for name in ("accuracy", "std_error", "mean_response_len", "finished")
        if name in record
    }
    for domain, measured in record.get("domains", {}).items():
        scalars |= {f"{group}/{domain}/{name}": float(measured[name]) for name in ("accuracy", "std_error")}
    return scalars


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    """The records of one kind, by step."""
    return sorted((record for record in records if record.get("kind") == kind), key=lambda record: record["step"])
