"""Tensors of an HF checkpoint that are no weights of its decoder, told by their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from megatron_tropd.json_files import printable

IGNORE_FLAG = "--ignore-extra-tensors"

_BUFFER = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_EXTRA = {
    "multi-token prediction": re.compile(r"^(model\.)?mtp[._]"),
    "vision tower": re.compile(r"^(model\.)?(visual|vision_tower|vision_model|multi_modal_projector)\."),
}
_QUANTIZED = {
    "FP8": re.compile(r"\.weight_scale_inv$"),
    "GPTQ": re.compile(r"\.g_idx$"),
    "AWQ or GPTQ": re.compile(r"\.(qweight|qzeros)$"),
    "bitsandbytes": re.compile(r"\.(absmax|SCB|quant_map|nested_absmax)$|\.quant_state\."),
    "compressed-tensors": re.compile(r"\.(weight_packed|weight_scale|weight_zero_point|input_scale)$"),
}


def rotary_buffers(names: Iterable[str]) -> set[str]:
    """Return the buffers of rotary embeddings that old checkpoints hold; like transformers, nothing reads them."""
    return {name for name in names if _BUFFER.search(name)}


def extra_tensors(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the tensors of parts beside the decoder, by part."""
    names = sorted(names)
    found = {part: [name for name in names if pattern.search(name)] for part, pattern in _EXTRA.items()}
    return {part: members for part, members in found.items() if members}


def quantization_of(names: Collection[str]) -> str | None:
    """Return the method of quantized weights whose scales or codes are among ``names``; None if none are."""
    return next((method for method, pattern in _QUANTIZED.items() if any(map(pattern.search, names))), None)


def listed(names: Iterable[str]) -> str:
    """Return names as text: the first five and the number of the rest."""
    names = sorted(names)
    return ", ".join(map(printable, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
