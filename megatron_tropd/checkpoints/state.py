"""The state dicts of a checkpoint: what is left out of them, and how a model takes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from megatron_tropd.checkpoints.metadata import CheckpointError

COMMON_KEY = "common"
"""Where the small plain values of a run are kept beside its tensors."""


def without_extra_state(state: Any) -> Any:
    """A copy of a state dict without Transformer Engine's ``_extra_state``.

    It is empty except under FP8, and without it local and TE layers exchange checkpoints.
    """
    if not isinstance(state, Mapping):
        return state
    return {name: without_extra_state(value) for name, value in state.items() if not str(name).endswith("_extra_state")}


def load_model_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Put a loaded model state into the model; every parameter must get a value.

    Raises:
        CheckpointError: names the missing and the unexpected parameters.
    """
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    if missing or unexpected:
        raise CheckpointError(f"the model has no value for {missing[:5]} and no place for {list(unexpected)[:5]}")
