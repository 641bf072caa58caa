"""Scores of whole sequences from those that the ranks of a context group made of their parts."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.models.context import held_index
from megatron_tropd.parallel import host_copies
from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.types import Microbatch, TeacherScores


def whole_scores(scores: TeacherScores, batch: Microbatch, part: Microbatch, groups: ModelGroups) -> TeacherScores:
    """Return the log-probabilities and entropies of all of ``batch``, in packed order, on every context rank.

    ``scores`` are those of ``part``, this rank's part of it; ``batch`` and ``part`` are on the host.  What uses them
    needs whole rollouts: means over a sample, and streams that are cut anew.  Every token is on one rank, so the sum
    over ranks is exact.  Collective over the context group; it does not wait for the device.
    """
    index = held_index(batch, groups)
    if index is None:
        return scores

    def gather(values: Tensor, all_rows: Tensor, rows: Tensor) -> Tensor:
        place = host_copies.pinned(torch.searchsorted(all_rows, index[rows])).to(values.device, non_blocking=True)
        whole = values.new_zeros(len(all_rows)).index_copy(0, place, values)
        dist.all_reduce(whole, group=groups.pg_collection.cp)
        return whole

    entropy = scores.entropy
    return replace(
        scores,
        logprob=gather(scores.logprob, batch.rows.response, part.rows.response),
        entropy=None if entropy is None else gather(entropy, batch.rows.written, part.rows.written),
    )
