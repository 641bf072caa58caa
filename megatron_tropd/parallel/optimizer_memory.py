"""Memory on this rank's device that only an update needs: Megatron's optimizer state and DDP's gradient buffers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_tropd.parallel import platform


def state_tensors(megatron_optimizer: Any) -> list[Tensor]:
    """Return what only the optimizer reads, on this rank's device: moments, and fp32 copies of 16-bit weights.  Weights
    that are trained in fp32 are not among it: the model reads them."""
    tensors: list[Tensor] = []
    for optimizer in getattr(megatron_optimizer, "chained_optimizers", [megatron_optimizer]):
        for name in ("fp32_from_float16_groups", "shard_fp32_from_float16_groups"):
            tensors += [master for group in getattr(optimizer, name, ()) for master in group if master is not None]
        states = optimizer.optimizer.state.values() if optimizer.optimizer is not None else ()
        tensors += [value for state in states for value in state.values() if isinstance(value, Tensor)]
    here = platform.device()
    return [tensor for tensor in tensors if tensor.device == here]


def free_gradient_buffers(ddp: Any) -> None:
    """Free the memory of DDP's gradient buffers; their tensors stay and must not be read."""
    for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers):
        buffer.grad_data.untyped_storage().resize_(0)


def restore_gradient_buffers(ddp: Any) -> None:
    """Give DDP's gradient buffers memory again, filled with zeros."""
    for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers):
        grad = buffer.grad_data
        grad.untyped_storage().resize_((grad.storage_offset() + grad.numel()) * grad.itemsize)
        grad.zero_()
