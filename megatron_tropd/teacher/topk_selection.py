"""Drops the top-k of tokens whose loss is certain not to read it, before scores are sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron_tropd.objectives.topk_use import may_use_topk
from megatron_tropd.parallel.exchange import gather_objects
from megatron_tropd.types import Rollout, TeacherScores, TopkUse


def select_topk(scores: TeacherScores, rollout: Rollout, use: TopkUse) -> TeacherScores:
    """Return ``scores``, dense and on the CPU, with the top-k of the tokens that may need it; unchanged where the
    numbers of these tokens would take more bytes than is saved."""
    if scores.topk_ids is None or scores.topk_logprobs is None:
        return scores
    rows = may_use_topk(use, scores, rollout).nonzero().squeeze(1)
    num_written, top_k = scores.topk_ids.shape
    if len(rows) * (2 * top_k + 1) >= num_written * 2 * top_k:
        return scores
    return replace(
        scores, topk_rows=rows.int(), topk_ids=scores.topk_ids[rows], topk_logprobs=scores.topk_logprobs[rows]
    )


def count_topk_rows(scored: Mapping[int, TeacherScores]) -> dict[int, int]:
    """Return the number of tokens with a top-k by rollout index, of what all ranks hold: who receives scores has to
    know their size.  Collective over the model's ranks."""
    mine = {index: len(scores.topk_rows) for index, scores in scored.items() if scores.topk_rows is not None}
    return {index: count for part in gather_objects(mine) for index, count in part.items()}
