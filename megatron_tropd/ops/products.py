"""The three matrix products of the head: logits, hidden gradient, weight gradient.

Operands are in the model's dtype; the weight gradient is summed over chunks in fp32.  On CUDA a product of bf16
operands accumulates in fp32 and may leave its result in fp32 (``out_dtype``, torch 2.8), or add it to an fp32 matrix
(torch 2.10; before, ``addmm`` refused a matrix of another dtype than its factors).  A CPU has no such product and its
bf16 product is slow in some layouts, so on a CPU the operands are converted to fp32 first, one slice of the vocabulary
at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_SLICE = 4096
"""Vocabulary rows whose fp32 copies exist at one time where operands have to be converted to fp32."""

_HAS_OUT_DTYPE = "dtype_out" in torch.ops.aten.mm.overloads()
_ADDS_TO_FP32 = torch.torch_version.TorchVersion(torch.__version__) >= "2.10"


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """``out`` [C, v] = hidden [C, H] weight' [H, v]; ``out`` in the operands' dtype or in fp32."""
    if out.numel() == 0:
        return
    if out.dtype == hidden.dtype and _is_plain(hidden):
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.is_cuda and _HAS_OUT_DTYPE:
        torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    else:
        wide = hidden.float()
        for part in _slices(len(weight)):
            out[:, part].copy_(wide @ weight[part].float().t())


def hidden_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """[C, H] = grad [C, v] weight [v, H], in the weight's dtype."""
    if _is_plain(weight):
        return grad.to(weight.dtype) @ weight
    total = torch.zeros(len(grad), weight.shape[1], device=grad.device)
    for part in _slices(len(weight)):
        total.addmm_(grad[:, part].float(), weight[part].float())
    return total.to(weight.dtype)


def add_weight_gradient(total: Tensor, grad: Tensor, hidden: Tensor) -> None:
    """``total`` [v, H] fp32 += grad' [v, C] hidden [C, H]."""
    if hidden.dtype == torch.float32:
        total.addmm_(grad.t(), hidden)
    elif hidden.is_cuda and _ADDS_TO_FP32:
        torch.addmm(total, grad.to(hidden.dtype).t(), hidden, out_dtype=torch.float32, out=total)
    elif hidden.is_cuda and _HAS_OUT_DTYPE:
        for part in _slices(len(total)):
            total[part] += torch.mm(grad[:, part].to(hidden.dtype).t(), hidden, out_dtype=torch.float32)
    else:
        wide = hidden.float()
        for part in _slices(len(total)):
            total[part].addmm_(grad[:, part].float().t(), wide)


def _is_plain(operand: Tensor) -> bool:
    """Whether this device multiplies operands of this dtype well without conversion."""
    return operand.is_cuda or operand.dtype == torch.float32


def _slices(size: int) -> Iterator[slice]:
    for start in range(0, size, _SLICE):
        yield slice(start, min(start + _SLICE, size))
