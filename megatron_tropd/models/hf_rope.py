"""Read the RoPE of a model from transformers' configuration object."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_tropd.json_files import shown
from megatron_tropd.models.architecture import Llama3Scaling, UnsupportedArchitecture, YarnScaling
from megatron_tropd.models.hf_fields import check


def rope_fields(hf: Any) -> dict[str, Any]:
    """Return the fields of an Architecture that describe RoPE.

    Args:
        hf: transformers' configuration object, its RoPE parameters standardised.

    Raises:
        UnsupportedArchitecture: a kind of RoPE that is not supported, or a value that is none; names the key.
    """
    rope = _parameters(hf)
    share = rope.get("partial_rotary_factor")
    check(share is None or (share == 1 and not isinstance(share, bool)), "partial_rotary_factor", share, "1.0 or null")
    reader = _READERS[rope_kind(hf)]
    theta = _number(rope, "rope_theta")
    check(theta > 1, "rope_theta", theta, "a number above 1")
    return {"rope_theta": theta, **reader(rope, hf)}


def rope_kind(hf: Any) -> str:
    """Return the ``rope_type``.

    Raises:
        UnsupportedArchitecture: it is not supported, or ``type``, its older name, says something else.
    """
    rope = _parameters(hf)
    kind, older = rope.get("rope_type"), rope.get("type")
    if older is not None and older != kind:
        raise UnsupportedArchitecture(f"has RoPE of rope_type {shown(kind)} and type {shown(older)}; keep one of them")
    if not isinstance(kind, str) or kind not in _READERS:
        hint = f" ({_REASONS[kind]})" if isinstance(kind, str) and kind in _REASONS else ""
        if kind is None and any(isinstance(value, Mapping) for value in rope.values()):
            hint = " (RoPE by layer type)"
        raise UnsupportedArchitecture(
            f"has rope_type {shown(kind)}{hint} in rope_parameters or rope_scaling; supported are "
            f"{', '.join(sorted(_READERS))}"
        )
    return kind


def _parameters(hf: Any) -> Mapping[str, Any]:
    """Return the RoPE parameters in the form of transformers 5, which keeps all of them in ``rope_parameters``."""
    rope = getattr(hf, "rope_parameters", None)
    if rope is None:  # transformers 4
        rope = dict(getattr(hf, "rope_scaling", None) or {})
        rope.setdefault("rope_type", rope.get("type", "default"))
        rope.setdefault("rope_theta", getattr(hf, "rope_theta", 10000.0))
        rope.setdefault("partial_rotary_factor", getattr(hf, "partial_rotary_factor", None))
    return rope


def _number(rope: Mapping[str, Any], key: str) -> float:
    """Return a positive number of the RoPE parameters."""
    value = rope.get(key)
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e15
    check(good, f"RoPE {key}" if key != "rope_theta" else key, value, "a positive number up to 1e15")
    return float(value)  # type: ignore[arg-type]  # checked above


def _original_length(rope: Mapping[str, Any]) -> int:
    key = "original_max_position_embeddings"
    length = _number(rope, key)
    check(isinstance(rope[key], int), f"RoPE {key}", rope[key], "a positive integer")
    return int(length)


def _plain(rope: Mapping[str, Any], hf: Any) -> dict[str, Any]:
    return {}


def _dynamic(rope: Mapping[str, Any], hf: Any) -> dict[str, Any]:
    """Dynamic NTK scaling is plain RoPE up to ``max_position_embeddings``, the longest sequence of a run."""
    _number(rope, "factor")
    return {}


def _linear(rope: Mapping[str, Any], hf: Any) -> dict[str, Any]:
    return {"rope_linear_factor": _number(rope, "factor")}


def _llama3(rope: Mapping[str, Any], hf: Any) -> dict[str, Any]:
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    check(low < high, "RoPE low_freq_factor", low, f"less than high_freq_factor {high:g}")
    scaling = Llama3Scaling(
        factor=_number(rope, "factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=_original_length(rope),
    )
    return {"rope_llama3": scaling}


def _yarn(rope: Mapping[str, Any], hf: Any) -> dict[str, Any]:
    original = _original_length(rope)
    factor = hf.max_position_embeddings / original if rope.get("factor") is None else _number(rope, "factor")
    truncate = rope.get("truncate", True)
    check(isinstance(truncate, bool), "RoPE truncate", truncate, "true or false")
    scaling = YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=_number(rope, "beta_fast") if rope.get("beta_fast") else 32.0,
        beta_slow=_number(rope, "beta_slow") if rope.get("beta_slow") else 1.0,
        truncate=truncate,
        attention_factor=_attention_factor(rope, factor),
    )
    return {"rope_yarn": scaling}


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """Return 0.1 ln(factor) + 1, the YaRN paper's, unless the config gives another or both of DeepSeek's mscales."""

    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return temperature(_number(rope, "mscale")) / temperature(_number(rope, "mscale_all_dim"))
    return temperature(1.0)


_READERS: dict[str, Callable[[Mapping[str, Any], Any], dict[str, Any]]] = {
    "default": _plain,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}
_REASONS = {
    "longrope": "its frequencies depend on the longest sequence of a batch, so a rollout and its scores could differ",
    "proportional": "it rotates a part of each head",
}
