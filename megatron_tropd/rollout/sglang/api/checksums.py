"""What a server's own checksums must be, worked out from the tensors that were sent to it.

SGLang merges q, k, v and gate, up, and pads: the vocabulary to a multiple of 64, and on a CPU the
intermediate size to a multiple of 32.  Its /weights_checker hashes those parameters: on a CPU by SHA-256.
"""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor

_VOCAB_MULTIPLE = 64
_INTERMEDIATE_MULTIPLE = 32  # on a CPU only

_PARTS = re.compile(r"(.*\.)(q|k|v|gate|up)_proj\.(weight|bias)")
_MERGED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
_ORDER = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


def _padded(tensor: Tensor, dim: int, multiple: int) -> Tensor:
    shape = list(tensor.shape)
    if shape[dim] % multiple == 0:
        return tensor
    shape[dim] = multiple - shape[dim] % multiple
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _as_held(hf_name: str, tensor: Tensor) -> Tensor:
    if hf_name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return _padded(tensor, 0, _VOCAB_MULTIPLE)
    if hf_name.endswith(("gate_proj.weight", "up_proj.weight")):
        return _padded(tensor, 0, _INTERMEDIATE_MULTIPLE)
    if hf_name.endswith("down_proj.weight"):
        return _padded(tensor, 1, _INTERMEDIATE_MULTIPLE)
    return tensor


class SentChecksums:
    """Hashes tensors as they are sent, for a dense model on one CPU server process.

    Only tensors whose merge partners are still missing are kept.
    """

    def __init__(self) -> None:
        self._hashes: dict[str, str] = {}
        self._waiting: dict[str, dict[str, Tensor]] = {}

    def add(self, hf_name: str, tensor: Tensor) -> None:
        """Enter one tensor, in the dtype that the server holds."""
        held = _as_held(hf_name, tensor.detach().cpu())
        match = _PARTS.fullmatch(hf_name)
        if match is None:
            self._hashes[hf_name] = _digest([held])
            return
        merged = _MERGED[match[2]]
        name, order = f"{match[1]}{merged}_proj.{match[3]}", _ORDER[merged]
        parts = self._waiting.setdefault(name, {})
        parts[match[2]] = held
        if len(parts) == len(order):
            self._hashes[name] = _digest([parts[part] for part in order])
            del self._waiting[name]

    def result(self) -> dict[str, str]:
        """Checksum by the server's parameter name."""
        return dict(self._hashes)


def _digest(tensors: list[Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]
