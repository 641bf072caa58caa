"""The directory of one run, written by rank 0.

Files::

    config.yaml              resolved configuration, keys are flag names (secrets hidden)
    teachers/NAME.yaml       one of several teachers, as a file of --teacher-config
    env.json                 code, versions, machine, command line; changed flags; earlier launches
    metrics.jsonl            one line for each step and each evaluation
    rollouts/step_*.jsonl    a few rollouts as text
    unfinished/              rollouts and scores of the batch that is not trained on yet (``training/spool.py``)
    hang_*.txt               stacks of all ranks of a job that hung (``parallel/hang_watch.py``)
    heartbeat.json           what rank 0 is doing (``progress/heartbeat.py``)
    hf_export/               the student at the end (``training/finish.py``)
    interrupted_N/           log and rollouts of an earlier launch that ended before its first checkpoint
    plots/  report.html      made from the files above (``python -m megatron_tropd.reporting.report RUN_DIR``)
    stop                     made by whoever wants the run to save and end (``training/stopping.py``)
    run.lock                 host and process of the job that writes here; empty when there is none
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from megatron_tropd.atomic_files import write_text
from megatron_tropd.reporting.environment import describe_environment
from megatron_tropd.reporting.lock import LOCK_FILE, RunLock
from megatron_tropd.reporting.metrics_file import MetricsFile
from megatron_tropd.reporting.records import (
    Record,
    decode,
    drop_after,
    encode,
    eval_record,
    of_kind,
    read_records,
    step_record,
)
from megatron_tropd.reporting.redaction import redact_mapping
from megatron_tropd.reporting.rollout_samples import RolloutSample, write_samples
from megatron_tropd.reports import EvalReport, StepReport

log = logging.getLogger(__name__)
HF_EXPORT = "hf_export"
_OF_A_LAUNCH = ("metrics.jsonl", "rollouts", "plots", "report.html")
"""What a launch that starts from nothing must not mix with its own."""


def is_exported(run_dir: Path) -> bool:
    """Whether a run has written all of its export: ``config.json`` is the last file of one."""
    return (run_dir / HF_EXPORT / "config.json").is_file()


class RunDirectory:
    """The files of a run whose lock this process holds; a context manager that releases the lock.

    Methods that write into a run raise RunDirectoryBusyError where another job has taken the directory over.

    Example:
        with RunDirectory.create("runs/a", config={"lr": 1e-6}, resume=True) as run:
            run.rewind(start_step)
            run.step(report)
    """

    def __init__(self, path: Path, lock: RunLock) -> None:
        self.path = path
        self._lock = lock
        self._metrics = MetricsFile(path / "metrics.jsonl")
        self._rollouts_failed = False
        self.message: Callable[[str], None] = log.warning
        """Prints to the user."""
        self.moved_aside: Path | None = None
        """Where the log of an earlier launch is now that this one could not go on from."""

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        config: Mapping[str, object],
        resume: bool,
        defaults: Mapping[str, object] | None = None,
    ) -> RunDirectory:
        """Take the directory and write ``config.yaml`` and ``env.json``.

        With ``resume`` the directory holds the run that goes on; the caller then says with :meth:`rewind` from which
        step.  Without, the log of an earlier launch, which left no checkpoint, is moved aside (``moved_aside``).  With
        ``defaults`` the report can show the flags that differ from them.

        Raises:
            ValueError: without ``resume`` the directory holds the export of a run that was finished.
            RunDirectoryBusyError: another process writes to it.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(path / LOCK_FILE)
        try:
            moved = _make_room(path, resume=resume)
            for folder in (path / "rollouts", path / "plots"):
                folder.mkdir(exist_ok=True)
            _write_config(path, plain(redact_mapping(config)))
            _write_environment(path, _changed(config, defaults))
        except BaseException:
            lock.release()
            raise
        directory = cls(path, lock)
        directory.moved_aside = moved
        return directory

    def teacher(self, name: str, settings: Mapping[str, object]) -> None:
        """Write what describes one of several teachers."""
        (self.path / "teachers").mkdir(exist_ok=True)
        text = yaml.safe_dump(plain(redact_mapping(dict(settings))), sort_keys=False, width=100)
        write_text(self.path / "teachers" / f"{name}.yaml", text)

    def rewind(self, step: int) -> int:
        """Delete everything after ``step``, so that no curve has a point twice; returns how many lines were dropped."""
        self._close_metrics()
        dropped = drop_after(self.path / "metrics.jsonl", step)
        for samples in (self.path / "rollouts").glob("step_*.jsonl"):
            if step_of(samples) > step:
                samples.unlink()
        return dropped

    def step(self, report: StepReport) -> Record:
        """Append one training step; returns the record that was written."""
        return self._append(step_record(report))

    def evaluation(self, report: EvalReport) -> Record:
        """Append one evaluation; returns the record that was written."""
        return self._append(eval_record(report))

    def has_evaluation(self, step: int) -> bool:
        """Return whether an evaluation after ``step`` was appended, by this launch or an earlier one."""
        waiting = [decode(line) for line in self._metrics.waiting]
        records = of_kind([*read_records(self.path / "metrics.jsonl"), *waiting], "eval")
        return any(record["step"] == step for record in records)

    def rollouts(self, step: int, samples: Sequence[RolloutSample]) -> Path:
        """Write the rollouts of ``step`` that are kept for reading; where that fails, a warning, once, is all."""
        self._lock.check()
        path = self.path / "rollouts" / f"step_{step:07d}.jsonl"
        try:
            write_samples(path, samples)
            self._rollouts_failed = False
        except OSError as error:
            if not self._rollouts_failed:
                self.message(f"warning: {error}; the run goes on without these rollouts")
            self._rollouts_failed = True
        return path

    def close(self) -> None:
        """Close the files and release the lock."""
        self._close_metrics()
        self._lock.release()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _append(self, record: Record) -> Record:
        self._lock.check()
        if note := self._metrics.append(encode(record)):
            self.message(f"warning: {note}")
        return record

    def _close_metrics(self) -> None:
        if note := self._metrics.close():
            self.message(f"warning: {note}")


def _make_room(path: Path, *, resume: bool) -> Path | None:
    """Drop lines that a crash cut off; without ``resume``, move the log of an earlier launch aside and return where to.

    A launch that ended before its first checkpoint left nothing to go on from.  The same command, given again by a
    person or by the job's launcher, must work all the same, and must not mix its lines with those.
    """
    metrics = path / "metrics.jsonl"
    if resume or not metrics.exists():
        drop_after(metrics, None)
        return None
    if is_exported(path):
        raise ValueError(
            f"run directory {path} already holds a run that was finished, but not its checkpoints: choose another "
            "directory, say with --load where the checkpoints are, or delete the directory"
        )
    if not read_records(metrics):  # not one step
        drop_after(metrics, -1)
        return None
    number = next(number for number in itertools.count(1) if not (path / f"interrupted_{number}").exists())
    aside = path / f"interrupted_{number}"
    aside.mkdir()
    for name in reversed(_OF_A_LAUNCH):  # the lines last: until then a launch that comes after this one moves the rest
        if (path / name).exists():
            os.rename(path / name, aside / name)
    if (path / "config.yaml").exists():
        shutil.copyfile(path / "config.yaml", aside / "config.yaml")
    return aside


def step_of(samples: Path) -> int:
    """The step of a rollout file, from its name."""
    return int(samples.stem.removeprefix("step_"))


def plain(value: Any) -> Any:
    """The same value in types that YAML and JSON can write without tags."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name.lower()
    if value is None or isinstance(value, bool):
        return value
    # Subclasses too (numpy's float64 is a float), which the safe YAML writer would refuse.
    kind = next((kind for kind in (int, float, str) if isinstance(value, kind)), str)
    return kind(value)


def _write_config(path: Path, config: dict[str, Any]) -> None:
    target = path / "config.yaml"
    text = yaml.safe_dump(config, sort_keys=False, width=100)
    if target.exists() and (before := target.read_text(encoding="utf-8")) != text:
        # A run may be resumed with other flags; the flags of its first part must not be lost.
        number = 1 + len(list(path.glob("config.before_*.yaml")))
        write_text(path / f"config.before_{number}.yaml", before)
    write_text(target, text)


def _changed(config: Mapping[str, object], defaults: Mapping[str, object] | None) -> dict[str, Any] | None:
    if defaults is None:
        return None
    differs = {name: value for name, value in config.items() if name not in defaults or defaults[name] != value}
    return {name: _finite(value) for name, value in plain(redact_mapping(differs)).items()}


def _finite(value: Any) -> Any:
    """``value``, or its name where it is not finite: JSON has no infinity, and only people read this list."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _write_environment(path: Path, changed: dict[str, Any] | None) -> None:
    target = path / "env.json"
    environment = describe_environment() | {"changed_flags": changed, "earlier_launches": []}
    if target.exists():
        before = json.loads(target.read_text(encoding="utf-8"))
        brief = {name: before.get(name) for name in ("started", "host", "command", "git")}
        environment["earlier_launches"] = [*before.get("earlier_launches", []), brief]
    write_text(target, json.dumps(environment, indent=1, allow_nan=False, default=str) + "\n")
