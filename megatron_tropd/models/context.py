"""The part of a micro-batch that a rank holds under context parallelism."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from megatron_tropd.parallel.context import held_tokens
from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.types import LabelRows, Microbatch


def held_index(batch: Microbatch, groups: ModelGroups) -> Tensor | None:
    """Return the positions [T / cp] of the whole ``batch`` that this rank holds; None where it holds all."""
    cp = groups.layout.cp
    return held_tokens(batch.cu_seqlens, len(batch.token_T), cp=cp, rank=groups.coords.cp) if cp > 1 else None


def held_part(batch: Microbatch, groups: ModelGroups) -> Microbatch:
    """Return this rank's tokens of the whole ``batch``, each with its own label.

    Labels were written before the cut, so the last token of a chunk has the label that begins the next one.  The bounds
    of the sequences stay those of the whole batch: the kernels divide them.
    """
    index = held_index(batch, groups)
    if index is None:
        return batch
    streams = batch.streams.rows(index)
    return replace(
        batch, token_T=batch.token_T[index], position_T=batch.position_T[index], streams=streams,
        rows=LabelRows.of(streams.region_T),
    )  # fmt: skip
