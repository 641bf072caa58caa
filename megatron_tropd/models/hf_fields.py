"""The fields of an HF ``config.json``: what each may hold, wherever this package or transformers reads it.

transformers computes with most of them before it looks at their types.  One that is missing or null has its default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_tropd.json_files import finite_number, shown
from megatron_tropd.models.architecture import UnsupportedArchitecture


@dataclass(frozen=True, slots=True)
class Field:
    """What a field may hold."""

    expected: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    try:
        finite_number(value, "")
    except ValueError:
        return False
    return True


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype)


def _size(largest: int, smallest: int = 1) -> Field:
    kind = f"a positive integer up to {largest}" if smallest else f"an integer from 0 to {largest}"
    return Field(kind, lambda value: _is_whole(value) and smallest <= value <= largest)


def _list_of(what: str, fits: Callable[[Any], bool]) -> Field:
    return Field(f"a list of {what}", lambda value: isinstance(value, list) and all(map(fits, value)))


_SIZE = _size(2**31 - 1)
_LAYERS = _size(10_000)
_NUMBER = Field("a finite number", _is_number)
_SWITCH = Field("true or false", lambda value: isinstance(value, bool))
_TEXT = Field("text", lambda value: isinstance(value, str))
_DTYPE = Field("the name of a dtype", lambda value: isinstance(value, str) and (value == "auto" or _is_dtype(value)))
_OBJECT = Field("an object", lambda value: isinstance(value, Mapping))
_TOKENS = Field(
    "a token id or a list of token ids",
    lambda value: all(map(_is_whole, value if isinstance(value, list) else [value])),
)

FIELDS: dict[str, Field] = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
         "max_position_embeddings", "num_experts", "num_local_experts", "num_experts_per_tok",
         "moe_intermediate_size", "sliding_window"), _SIZE),
    "num_hidden_layers": _LAYERS,  # transformers makes lists of that length
    "num_labels": _size(1_000_000),  # this too
    "max_window_layers": _size(2**31 - 1, 0),
    "decoder_sparse_step": _size(2**31 - 1, 0),
    "rms_norm_eps": Field("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value < 1),
    "rope_theta": Field("a number above 1, up to 1e15", lambda value: _is_number(value) and 1 < value <= 1e15),
    **dict.fromkeys(
        ("partial_rotary_factor", "initializer_range", "attention_dropout", "router_aux_loss_coef",
         "original_max_position_embeddings"), _NUMBER),
    **dict.fromkeys(
        ("tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias", "use_cache", "norm_topk_prob",
         "output_router_logits"), _SWITCH),
    **dict.fromkeys(("model_type", "hidden_act", "transformers_version"), _TEXT),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "text_config", "id2label", "label2id"), _OBJECT),
    **dict.fromkeys(("dtype", "torch_dtype"), _DTYPE),
    "architectures": _list_of("names", lambda value: isinstance(value, str)),
    "layer_types": _list_of("names", lambda value: isinstance(value, str)),
    "mlp_only_layers": _list_of("layer numbers", _is_whole),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _TOKENS),
}  # fmt: skip


def check(good: object, key: str, value: object, expected: str) -> None:
    """Raise UnsupportedArchitecture, which names the key of the config, unless ``good``."""
    if not good:
        raise UnsupportedArchitecture(f"has {key} {shown(value)}; expected {expected}")


def check_field(key: str, value: object) -> None:
    """Raise UnsupportedArchitecture unless a field can hold ``value``."""
    check(FIELDS[key].fits(value), key, value, FIELDS[key].expected)


def check_fields(config: Mapping[str, Any]) -> None:
    """Check every field that a config has and that is not null.

    Raises:
        UnsupportedArchitecture: a field holds something else; the message names it.
    """
    for key in FIELDS:
        if config.get(key) is not None:
            check_field(key, config[key])
