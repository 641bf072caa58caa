"""Optional writers beside ``metrics.jsonl``: tensorboard and wandb.

A missing package is an error before anything starts (:func:`check_sinks`); a sink that fails
later is dropped with a warning and never ends the run: ``metrics.jsonl`` holds all the numbers.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_tropd.reporting.records import Record, eval_scalars, step_scalars
from megatron_tropd.reporting.redaction import redact_mapping
from megatron_tropd.reporting.run_directory import plain


class Sink(Protocol):
    """A destination for the numbers of a run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step."""

    def close(self) -> None:
        """Flush and end."""


class TensorboardSink:
    """Event files for ``tensorboard --logdir``."""

    def __init__(self, directory: str | Path, *, start_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier launch of the run wrote after the checkpoint.
        purge = start_step + 1 if start_step else None
        self._writer = SummaryWriter(log_dir=str(directory), purge_step=purge)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and end."""
        self._writer.close()


class WandbSink:
    """A Weights & Biases run; its id is kept in the run directory, so that a resumed run continues it."""

    def __init__(self, project: str, name: str | None, *, config: Mapping[str, object], run_dir: Path) -> None:
        import wandb

        kept = run_dir / "wandb_id.txt"
        known = kept.read_text(encoding="utf-8").strip() if kept.exists() else None
        self._run = wandb.init(
            project=project,
            name=name or run_dir.resolve().name,
            id=known,
            resume="allow",
            dir=str(run_dir),
            config=plain(redact_mapping(config)),
        )
        kept.write_text(f"{self._run.id}\n", encoding="utf-8")
        # A step axis of our own: wandb drops values below its last step, and a resumed run logs such values.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Flush and end."""
        self._run.finish()


class Sinks:
    """All sinks of a run; one that fails is warned about once and dropped."""

    def __init__(self, sinks: Mapping[str, Sink]) -> None:
        self._sinks = dict(sinks)

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def record(self, record: Record) -> None:
        """Send a record of ``metrics.jsonl``, a step or an evaluation."""
        values = step_scalars(record) if record["kind"] == "step" else eval_scalars(record)
        for name, sink in list(self._sinks.items()):
            try:
                sink.scalars(record["step"], values)
            except Exception as error:  # a service that is down must not end a run of days
                del self._sinks[name]
                _warn(name, error)

    def close(self) -> None:
        """End every sink that still works."""
        while self._sinks:
            name, sink = self._sinks.popitem()
            try:
                sink.close()
            except Exception as error:
                _warn(name, error)


def check_sinks(*, tensorboard_dir: str | None, wandb_project: str | None) -> list[str]:
    """One message for each requested sink whose package is missing."""
    wanted = (
        ("--tensorboard-dir", tensorboard_dir, "tensorboard"),
        ("--wandb-project", wandb_project, "wandb"),
    )
    return [
        f"{flag} {value} needs the package {package}, which is not installed: "
        f"pip install 'megatron-tropd[{package}]', or leave {flag} out"
        for flag, value, package in wanted
        if value and not _installed(package)
    ]


def _installed(package: str) -> bool:
    """Whether a real package is installed: wandb leaves a folder ``wandb``, which imports as an empty package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def make_sinks(
    *,
    tensorboard_dir: str | None,
    wandb_project: str | None,
    wandb_exp_name: str | None,
    config: Mapping[str, object],
    run_dir: Path,
    start_step: int = 0,
) -> Sinks:
    """Open the sinks that were asked for; ``ValueError`` where a package is missing."""
    problems = check_sinks(tensorboard_dir=tensorboard_dir, wandb_project=wandb_project)
    if problems:
        raise ValueError("\n".join(problems))
    sinks: dict[str, Any] = {}
    makers: dict[str, Callable[[], Sink]] = {}
    if tensorboard_dir:
        makers["tensorboard"] = lambda: TensorboardSink(tensorboard_dir, start_step=start_step)
    if wandb_project:
        makers["wandb"] = lambda: WandbSink(wandb_project, wandb_exp_name, config=config, run_dir=run_dir)
    for name, make in makers.items():
        try:
            sinks[name] = make()
        except Exception as error:
            _warn(name, error)
    return Sinks(sinks)


def _warn(name: str, error: Exception) -> None:
    warnings.warn(
        f"{name} failed and is left out from here on, metrics.jsonl goes on: {type(error).__name__}: {error}",
        RuntimeWarning,
        stacklevel=3,
    )
