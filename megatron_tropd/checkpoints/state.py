"""The state dicts of a checkpoint: what is left out of them, and how one is loaded into a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from megatron_tropd.checkpoints.metadata import CheckpointError

COMMON_KEY = "common"
"""Key of the small plain values of a run in its state dict."""


def without_extra_state(state: Any) -> Any:
    """Copy a state dict without Transformer Engine's ``_extra_state``.

    That state is empty except under FP8.  Without it, checkpoints do not depend on whether layers are TE's or local.
    """
    if not isinstance(state, Mapping):
        return state
    return {name: without_extra_state(value) for name, value in state.items() if not str(name).endswith("_extra_state")}


def load_model_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a model state into the model, or the states of model chunks into a list of them; every parameter must get a
    value.

    Raises:
        CheckpointError: names the missing and the unexpected parameters.
    """
    if isinstance(model, nn.ModuleList):
        for number, chunk in enumerate(model):
            load_model_state(chunk, state[str(number)])
        return
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    if missing or unexpected:
        raise CheckpointError(f"the model has no value for {missing[:5]} and no place for {list(unexpected)[:5]}")
