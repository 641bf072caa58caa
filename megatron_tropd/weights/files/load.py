"""Fill a rank's GPTModel from an HF checkpoint, reading only the ranges that this rank holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.weights.coordinates.hf_shapes import EMBED_TOKENS
from megatron_tropd.weights.coordinates.megatron_boxes import rank_boxes
from megatron_tropd.weights.coordinates.parameters import local_parameters, match_parameters
from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint


@torch.no_grad()
def load_hf_into(
    model: nn.Module | Sequence[nn.Module], checkpoint: HfCheckpoint, arch: Architecture, layout: ParallelLayout,
    rank: int,
) -> None:  # fmt: skip
    """Copy this rank's part of ``checkpoint`` into ``model``; vocabulary padding becomes zero.  Not a collective.

    Values are cast to the parameter's dtype (exact if that is the file's dtype or fp32).

    Raises:
        WeightMismatch: the module is not ``arch`` cut by ``layout``; nothing has been copied in this case.
        HfCheckpointError: a stored copy of tied embeddings differs from them.
    """
    boxes = rank_boxes(arch, layout, rank)
    for parameter, wanted in match_parameters(local_parameters(model), boxes):
        if sum(box.numel for box in wanted.boxes) < parameter.numel():
            parameter.zero_()  # only a vocabulary table has rows without a box
        for box in wanted.boxes:
            parameter[box.local_slices].copy_(checkpoint.read(box.hf_name, box.start, box.size))
            if box.hf_name == EMBED_TOKENS:
                checkpoint.check_tied_copy(box.start, box.size)
