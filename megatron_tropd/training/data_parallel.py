"""Megatron's DDP around the model chunks, with what its schedules need to overlap communication and computation."""

from __future__ import annotations

from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_tropd.models.chunks import ModelChunks


def wrap(model: ModelChunks, config: DistributedDataParallelConfig) -> list[DistributedDataParallel]:
    """Wrap every chunk, and tell the schedules, through the model's config, when gradients and weights travel.

    Not inside a Float16Module: the model is bf16 already, and that wrapper would turn the last stage's hidden states,
    which still meet bf16 weights in the vocabulary head, into fp32.
    """
    wrapped = [
        # Only the first chunk's communication is on the critical path; the others have one bucket, as in Megatron-LM.
        DistributedDataParallel(model.config, config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(model.chunks)
    ]
    if config.overlap_grad_reduce:
        # Without it every micro-batch, not only the last, would begin to add up gradients over the replicas.
        model.config.no_sync_func = _one_or_all([chunk.no_sync for chunk in wrapped])
        # All stages begin at one time; a stage that waits for another's messages would be slowed by its own.
        model.config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in wrapped])
    if config.overlap_param_gather and config.align_param_gather:
        model.config.param_sync_func = _one_or_all([chunk.start_param_sync for chunk in wrapped])
    return wrapped


def _one_or_all(functions: list[Any]) -> Any:
    """Megatron's interleaved schedule takes a list, the others a function."""
    return functions[0] if len(functions) == 1 else functions
