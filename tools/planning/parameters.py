"""Parameters of a rank, and the bytes of weights, gradients and optimizer state.

The shapes are those of ``weights/coordinates``, which loading and conversion use: vocabulary padding, the second copy
of a tied table on the last pipeline stage and norms that every tensor-parallel rank has are in them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.weights.coordinates.engine_boxes import EngineLayout, engine_boxes
from megatron_tropd.weights.coordinates.hf_shapes import hf_shapes
from megatron_tropd.weights.coordinates.megatron_boxes import rank_boxes

_EXPERTS = ".mlp.experts."


@dataclass(frozen=True, slots=True, kw_only=True)
class RankParameters:
    """Parameters of one rank: those of experts have data-parallel ranks of their own."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts


@functools.cache
def rank_parameters(arch: Architecture, layout: ParallelLayout, stage: int) -> RankParameters:
    """Return the parameters of a rank of a pipeline stage; the ranks of a stage have equally many.

    Raises:
        ValueError: the weights cannot be cut by this layout; the message names the flags.
    """
    dense = experts = 0
    for param in rank_boxes(arch, layout, layout.rank(tp=0, pp=stage, dp=0)):
        if _EXPERTS in param.names[0]:
            experts += math.prod(param.shape)
        else:
            dense += math.prod(param.shape)
    return RankParameters(dense=dense, experts=experts)


@functools.cache
def engine_parameters(arch: Architecture, engine: EngineLayout) -> int:
    """Return the parameters of one rank of an SGLang engine; its ranks have equally many.

    Raises:
        ValueError: SGLang cannot cut the model this way; the message names the flags.
    """
    return sum(math.prod(param.shape) for param in engine_boxes(arch, engine, 0))


@functools.cache
def model_parameters(arch: Architecture) -> int:
    """Return the parameters of the whole model, as its HF checkpoint has them."""
    return sum(math.prod(shape) for shape in hf_shapes(arch).values())


@functools.cache
def largest_tensor(arch: Architecture) -> int:
    """Return the elements of the largest HF tensor."""
    return max(math.prod(shape) for shape in hf_shapes(arch).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """Bytes of a rank that trains, in every phase of a step."""

    weights: int
    gradients: int
    optimizer: int


def training_state(
    parameters: RankParameters, layout: ParallelLayout, *, bf16: bool, distributed_optimizer: bool
) -> TrainingState:
    """Return the bytes of weights, gradients and AdamW's state of a rank.

    Megatron-core with ``grad_reduce_in_fp32``: 2 or 4 bytes of weight, 4 of gradient; 8 of moments, and in bf16 4 of
    the fp32 master weight.  The distributed optimizer (ZeRO-1, arXiv 1910.02054) cuts moments and masters over the
    data-parallel ranks, an expert's over the ranks that have the same expert.  Padding of its buckets is left out.
    """
    state = 12 if bf16 else 8
    optimizer: float = state * parameters.total
    if distributed_optimizer:
        replicas = layout.dp * layout.cp
        expert_replicas = layout.stage_size // (layout.expert_tp * layout.ep)
        optimizer = state * (parameters.dense / replicas + parameters.experts / expert_replicas)
    return TrainingState(
        weights=(2 if bf16 else 4) * parameters.total, gradients=4 * parameters.total, optimizer=math.ceil(optimizer)
    )  # fmt: skip
