"""A loaded optimizer state in as many parts as the optimizer of this launch has.

Megatron's optimizer is one, or with ``--expert-model-parallel-size`` above 1 a chain of two: experts are replicated
over other ranks than the rest, so they have an optimizer of their own.  The tensors of a checkpoint bear the names of
their parameters and load into either.  The plain values beside them (settings of the parameter groups, the step count)
lie as the saving launch had them, whole or by number of the part, and Megatron looks for them as the loading launch
would have written them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Group = dict[str, Any]
"""Settings of a parameter group, and ``params``: the numbers of its parameters in this launch."""
_IDENTITY = ("wd_mult", "lr_mult", "is_decoupled_lr")
"""Settings by which Megatron tells groups of one part from each other; some versions write ``pre_`` before them."""
_LOCAL = ("params", "is_expert_parallel")
"""Of a group, what this launch decides."""


def in_parts_of(own_groups: Sequence[Sequence[Group]], loaded: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a state that ``dist_checkpointing`` has loaded as an optimizer with the given parameter groups takes it.

    Args:
        own_groups: parameter groups of each part of the optimizer of this launch.
        loaded: its sharded state dict with values, and beside them the plain values as they were saved.

    Raises:
        ValueError: no saved group has the multipliers of one of these.
    """
    numbered = {key: value for key, value in loaded.items() if isinstance(key, int)}
    whole = {key: value for key, value in loaded.items() if not isinstance(key, int)}
    if len(own_groups) == 1:
        return _completed(whole, list(numbered.values()), own_groups[0]) if numbered else whole
    if not whole:
        return numbered
    return {part: _completed(numbered[part], [whole], groups) for part, groups in enumerate(own_groups)}


def _completed(part: Mapping[Any, Any], saved: Sequence[Mapping[Any, Any]], own_groups: Sequence[Group]) -> Group:
    """``part``, which has tensors only, with the plain values of the parts that were saved."""
    out = dict(part)
    for key in dict.fromkeys(key for one in saved for key in one):
        values = [one[key] for one in saved if key in one]
        if key == "param_groups":
            known = [group for groups in values for group in groups]
            local = part.get(key) or [{}] * len(own_groups)
            out[key] = [_settings(own, known) | dict(mine) for own, mine in zip(own_groups, local, strict=True)]
        elif isinstance(values[0], Mapping):
            out[key] = _completed(part.get(key, {}), values, own_groups)
        elif key not in part:
            out[key] = values[0]
    return out


def _settings(own: Group, saved: Sequence[Group]) -> Group:
    """The settings of the saved group that has the multipliers of ``own``."""
    for group in saved:
        if _identity(group) == _identity(own):
            return {**group, **{name: own[name] for name in _LOCAL if name in own and name in group}}
    raise ValueError(
        f"the optimizer in the checkpoint has no parameter group with {_identity(own)} ({', '.join(_IDENTITY)}), "
        f"only with {sorted(map(_identity, saved), key=repr)}"
    )


def _identity(group: Group) -> tuple[Any, ...]:
    return tuple(group.get(name, group.get(f"pre_{name}")) for name in _IDENTITY)
