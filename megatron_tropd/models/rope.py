"""Frequencies of rotary position embeddings, as transformers computes them: in fp32, in the same order of operations.

Megatron has versions of its own.  Its llama3 fixes three of four numbers, its linear scales positions, and its YaRN
puts the attention factor into RoPE, where Transformer Engine's fused kernel ignores it (``build.py`` scales attention).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_tropd.models.architecture import Architecture, Llama3Scaling, YarnScaling


def inverse_frequencies(plain: Tensor, arch: Architecture) -> Tensor:
    """Return the inverse frequencies [head_dim / 2] of ``arch``, given those of plain RoPE."""
    if arch.rope_linear_factor is not None:
        return plain / arch.rope_linear_factor
    if arch.rope_llama3 is not None:
        return _llama3(plain, arch.rope_llama3)
    if arch.rope_yarn is not None:
        return _yarn(plain, arch.rope_yarn, arch.rope_theta)
    return plain


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Llama 3.1: long wavelengths divided by ``factor``, short ones kept, a linear blend between."""
    wavelength = 2 * math.pi / plain
    original = scaling.original_max_position_embeddings
    blend = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * plain / scaling.factor + blend * plain
    scaled = torch.where(wavelength > original / scaling.low_freq_factor, plain / scaling.factor, blended)
    return torch.where(wavelength < original / scaling.high_freq_factor, plain, scaled)


def _yarn(plain: Tensor, scaling: YarnScaling, theta: float) -> Tensor:
    """YaRN (arXiv 2309.00071): dimensions that turn more than ``beta_fast`` times over the original length are kept,
    those that turn less than ``beta_slow`` times are divided by ``factor``, a linear ramp over dimensions between."""
    dim = 2 * len(plain)

    def dimension(turns: float) -> float:
        ratio = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=plain.device) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    periods = theta ** (torch.arange(0, dim, 2, device=plain.device).float() / dim)
    return 1 / (scaling.factor * periods) * (1 - kept) + plain * kept
