"""The HF directory of the model that is to be evaluated, wherever it comes from."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tropd.data.tokenizer import load_tokenizer
from megatron_tropd.hub import MODEL_FILES, resolve
from megatron_tropd.parallel import platform
from megatron_tropd.reporting.run_directory import HF_EXPORT, is_exported
from megatron_tropd.weights.files.hf_checkpoint import read_headers
from megatron_tropd.weights.files.identity import model_identity

_CONVERTED = ".converted-from"
"""File in a converted directory that names its source, written last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel:
    """What is served."""

    path: Path
    """HF directory with weights, tokenizer and chat template."""
    name: str
    """For tables."""
    identity: dict[str, Any]
    """What must stay the same when a run goes on; ready for JSON."""


def from_hf(name: str, flag: str) -> EvaluatedModel:
    """Return the model of an HF directory or of a name of the Hub.

    Raises:
        OSError, ValueError: there is none, or it has no safetensors files.
    """
    found = resolve(name, repo_type="model", allow_patterns=MODEL_FILES, flag=flag)
    path = found.path.absolute()
    if not any(path.glob("*.safetensors")):
        raise FileNotFoundError(f"{flag} {path} is no HF model directory: it has no *.safetensors")
    return EvaluatedModel(path=path, name=found.source or path.name, identity={"weights": model_identity(path)})


def from_run(run_dir: Path) -> EvaluatedModel:
    """Return the model that a training run exported at its end; errors as :func:`from_hf`."""
    path = run_dir / HF_EXPORT
    if not is_exported(run_dir):
        raise FileNotFoundError(
            f"--run-dir {run_dir} has no {HF_EXPORT}/config.json, the last file that a run writes at its end; train it "
            "to its end, or give --load with its checkpoints"
        )
    model = from_hf(str(path), "--run-dir")
    return EvaluatedModel(path=model.path, name=run_dir.absolute().name, identity=model.identity)


def from_megatron(
    load: Path, iteration: str | None, save: Path, say: Callable[[str], None], *, keeps: bool
) -> EvaluatedModel:
    """Convert a Megatron checkpoint to ``save``, unless that was done before.

    Args:
        load: directory with the tracker.
        iteration: a number or ``release``; None: what the tracker names.
        save: HF directory to write.
        say: called with a line before the conversion starts.
        keeps: whether ``save`` is the user's, where nothing may be overwritten.

    Raises:
        OSError, ValueError: the checkpoint cannot be used; with the converter's own message.
    """
    platform.install()  # before the first import of Megatron
    from megatron_tropd.checkpoints.directory import RELEASE, find_checkpoint
    from megatron_tropd.checkpoints.metadata import METADATA_JSON

    if iteration is not None and iteration != RELEASE and not iteration.isdecimal():
        raise ValueError(f"--iteration {iteration}: expected a number or {RELEASE!r}")
    chosen = int(iteration) if iteration and iteration.isdecimal() else RELEASE if iteration else None
    folder = find_checkpoint(load, chosen).absolute()
    marker, source = save / _CONVERTED, f"{folder}\n{hashlib.sha256((folder / METADATA_JSON).read_bytes()).hexdigest()}"
    if not (marker.is_file() and marker.read_text(encoding="utf-8") == source):
        if keeps and save.is_dir() and any(save.iterdir()):
            raise ValueError(f"--save-hf {save} is not empty and does not hold {folder}; give an empty directory")
        say(f"converting {folder} to {save}")
        marker.unlink(missing_ok=True)
        found = folder.name.removeprefix("iter_")
        done = subprocess.run(
            [sys.executable, "-m", "checkpoint_convert.megatron_to_hf", "--load", str(load), "--iteration",
             found if found == RELEASE else str(int(found)), "--save", str(save), "--overwrite"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise ValueError(f"--load {load} could not be converted: {(done.stderr or done.stdout).strip()}")
        marker.write_text(source, encoding="utf-8")
    model = from_hf(str(save), "--load")
    return EvaluatedModel(path=model.path, name=f"{load.absolute().name}/{folder.name}", identity=model.identity)


def check_text(model: EvaluatedModel, flag: str, *, needs_template: bool) -> None:
    """Check before a server starts what it would fail at later.

    Raises:
        OSError, ValueError: the directory has no usable weights or tokenizer, or no chat template.
    """
    read_headers(model.path)  # no more: servers know families, and quantized weights, that this package does not build
    if not load_tokenizer(model.path).chat_template and needs_template:
        raise ValueError(
            f"{flag} {model.path}: its tokenizer has no chat template, and benchmarks are asked as chat messages; add "
            "chat_template.jinja to the directory, or give --sglang-chat-template"
        )
