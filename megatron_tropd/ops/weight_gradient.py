"""Adds the output table's gradient where it is kept, in backward: to Megatron's fp32 main_grad, or else to .grad.

Megatron's DDP keeps an fp32 sum ``weight.main_grad`` and adds ``weight.grad``, which has the weight's dtype, to
it in a hook of the weight's gradient accumulator.  A layer may instead add to ``main_grad`` itself, set
``grad_added_to_main_grad`` and return a placeholder: the hook then ignores ``weight.grad`` and still counts the
weight as ready (megatron-core 0.16.1, ``distributed_data_parallel.py`` and ``tensor_parallel/layers.py``).  A
tied table on one stage has ``zero_out_wgrad``: the embedding's gradient arrives in ``weight.grad`` too and
the hook adds ``weight.grad``, so the placeholder is zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def keeps_main_grad(weight: Tensor) -> bool:
    """Whether Megatron's DDP owns the gradient of ``weight``."""
    return getattr(weight, "main_grad", None) is not None and hasattr(weight, "grad_added_to_main_grad")


def _main_grad(weight: Any) -> Tensor:
    return weight.main_grad  # type: ignore[no-any-return]


def accumulator(weight: Tensor, *, now: bool) -> Tensor:
    """fp32 [rows, H] to add to: ``main_grad`` itself where backward is running (``now``), else fresh zeros."""
    if now and keeps_main_grad(weight) and (kept := _main_grad(weight)).dtype == torch.float32:
        return kept
    return torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)


def deliver(weight: Tensor, total: Tensor, upstream: Tensor | None = None) -> Tensor:
    """The value that backward returns for ``weight``, whose gradient is ``total`` [rows, H] times ``upstream``.

    ``total`` is what :func:`accumulator` gave: nothing is left to add where it is ``main_grad``.
    """
    if not keeps_main_grad(weight):
        return (total if upstream is None else total * upstream).to(weight.dtype)
    kept = _main_grad(weight)
    if total is not kept:
        if upstream is None:
            kept.add_(total)
        else:
            kept.addcmul_(total, upstream)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # Megatron's, as main_grad
    return weight.new_zeros(()).expand(weight.shape)  # a view of one number; copied only after ``total`` is freed
