"""Compares what two runs of one command left: weights, optimizer state, export and log, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_VARYING = ("engine/", "guard/", "memory/", "teacher/busy", "teacher/payload", "teacher/wait", "throughput/")
"""Metrics of a launch, of seconds or of what happened to it, and not of what it computed."""
_OF_ANOTHER_RUN = (".metadata", "run.json", "checkpoint.json")
"""Files of a checkpoint that name the run's directory, or hold digests of those that do."""
_SHOWN = 5


def differences(run: Path, other: Path, *, steps: int) -> list[str]:
    """Return in what ``run`` is not a whole run of ``steps`` steps that gave what ``other`` gave; [] if it is."""
    final = Path("checkpoints") / f"iter_{steps:07d}"
    found = []
    for folder, left_out in ((final, _OF_ANOTHER_RUN), (final / "hf", ()), (Path("hf_export"), ())):
        found += _unlike(_digests(run / folder, left_out), _digests(other / folder, left_out), str(folder))
    lines, others = _lines(run), _lines(other)
    for kind, step, decoding in sorted(key for key, count in Counter(key for key, _ in lines).items() if count > 1):
        found.append(f"metrics.jsonl: {kind} {step} {decoding} is there more than once")
    logged = [step for (kind, step, _), _ in lines if kind == "step"]
    if logged != list(range(1, steps + 1)):
        found.append(f"metrics.jsonl: steps are missing or in another order: {logged}")
    found += _unlike(dict(lines), dict(others), "metrics.jsonl")
    found += [f"{path} is left" for path in sorted((run / "checkpoints").glob("*.tmp-*"))]
    found += [f"{path} is left" for path in sorted((run / "unfinished").glob("*"))]
    return found


def _digests(folder: Path, left_out: tuple[str, ...]) -> dict[str, str]:
    files = [path for path in sorted(folder.glob("*")) if path.is_file() and path.name not in left_out]
    return {path.name: hashlib.sha256(_content(path)).hexdigest() for path in files}


def _content(path: Path) -> bytes:
    """Return the bytes of a file; of a pickle its values, because equal values can have several pickles."""
    if path.suffix != ".pt":
        return path.read_bytes()
    return repr(_plain(torch.load(path, weights_only=True))).encode()


def _plain(value: Any) -> Any:
    """Return what has another ``repr`` if a bit differs."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).tolist()
    if isinstance(value, Mapping):
        return [(key, _plain(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _lines(run: Path) -> list[tuple[tuple[str, int, str], dict[str, Any]]]:
    """Return of every line of the log its kind, step and decoding, and what repeats in another run."""
    found = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        record.pop("seconds", None)
        metrics = {name: value for name, value in record.get("metrics", {}).items() if not name.startswith(_VARYING)}
        found.append(((record["kind"], record["step"], record.get("decoding", "")), record | {"metrics": metrics}))
    return found


def _unlike(found: Mapping[Any, Any], wanted: Mapping[Any, Any], where: str) -> list[str]:
    if not wanted:
        return [f"{where}: the unbroken run has nothing there"]
    names = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    texts = [f"{where}: {name} differs: {_what_differs(found.get(name), wanted.get(name))}" for name in names[:_SHOWN]]
    return texts + ([f"{where}: and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else [])


def _what_differs(found: Any, wanted: Any) -> str:
    if not isinstance(found, dict) or not isinstance(wanted, dict):
        return f"{found}, expected {wanted}"
    flat, expected = ({**record, **record.get("metrics", {})} for record in (found, wanted))
    names = [name for name in {**flat, **expected} if name != "metrics" and flat.get(name) != expected.get(name)]
    return ", ".join(f"{name} is {flat.get(name)}, expected {expected.get(name)}" for name in names[:_SHOWN])
