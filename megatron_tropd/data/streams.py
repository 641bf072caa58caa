"""Numbers of a rollout besides its tokens (scores, advantages), and how they are written into streams of labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.types import Needs, Region, Rollout, TeacherScores, TokenStreams

_Place = slice | Tensor
_Source = tuple[str, Tensor | None, Tensor | None, _Place]
"""(name, stream to write, values or None if they are missing, labels that they belong to)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleScores:
    """Scores of one rollout with R response tokens, W of them written by the student; None for a score that the
    objective does not need."""

    teacher: TeacherScores | None = None
    reference_logprob: Tensor | None = None  # [R] fp32
    old_logprob: Tensor | None = None  # [R] fp32, the student before the first update on the batch
    old_entropy: Tensor | None = None  # [W] fp32
    advantage: float | None = None
    """Group advantage of the whole sample."""


def blank_streams(num_tokens: int, needs: Needs, teacher_hidden: Tensor | None = None) -> TokenStreams:
    """Return the streams of ``num_tokens`` labels of padding.  ``needs`` decides which optional streams exist, except
    ``sample_start_T``, which always does.

    ``teacher_hidden`` is [0, H], with the width and dtype of the teacher's hidden states.

    Raises:
        ValueError: hidden states are needed, but ``teacher_hidden`` is None.
    """
    if needs.score.hidden and teacher_hidden is None:
        raise ValueError("an objective over the full vocabulary needs a teacher that sends its hidden states")
    shape, topk = (num_tokens,), (num_tokens, needs.top_k)

    def optional(wanted: object) -> Tensor | None:
        return torch.zeros(shape) if wanted else None

    return TokenStreams(
        label_T=torch.zeros(shape, dtype=torch.int64),
        region_T=torch.full(shape, Region.PAD, dtype=torch.uint8),
        sample_uid_T=torch.full(shape, -1, dtype=torch.int64),
        label_position_T=torch.zeros(shape, dtype=torch.int64),
        uniform_T=torch.full(shape, 0.5, dtype=torch.float64),
        rollout_logprob_T=torch.zeros(shape),
        written_len_T=torch.zeros(shape, dtype=torch.int64),
        teacher_logprob_T=torch.zeros(shape),
        teacher_topk_ids_TK=torch.zeros(topk, dtype=torch.int64) if needs.top_k else None,
        teacher_topk_logprob_TK=torch.full(topk, -torch.inf) if needs.top_k else None,
        teacher_entropy_T=optional(needs.teacher_entropy),
        teacher_hidden_TH=teacher_hidden.new_zeros(num_tokens, teacher_hidden.shape[1])
        if needs.score.hidden and teacher_hidden is not None
        else None,
        reference_logprob_T=optional(needs.reference_logprob),
        old_logprob_T=optional(needs.old_policy),
        old_entropy_T=optional(needs.old_policy),
        sequence_error_T=optional(needs.old_policy),
        advantage_T=optional(needs.rewards),
        sample_start_T=torch.zeros(shape, dtype=torch.bool),
    )


def write_scores(streams: TokenStreams, start: int, rollout: Rollout, sample: SampleScores, needs: Needs) -> None:
    """Write the scores of a sequence that begins at packed position ``start`` into the streams, in place.

    Raises:
        ValueError: a score that ``needs`` requires is missing, or its shape does not fit the response.
    """
    first = start + rollout.prompt_len - 1  # response token r is the label at position prompt_len - 1 + r
    response = slice(first, first + rollout.response_len)
    written = slice(first + rollout.guidance_len, response.stop)
    sources: list[_Source] = [
        ("reference log-probability", streams.reference_logprob_T, sample.reference_logprob, response),
        ("old log-probability", streams.old_logprob_T, sample.old_logprob, response),
        ("old entropy", streams.old_entropy_T, sample.old_entropy, written),
    ]
    if needs.teacher:
        scores = sample.teacher
        sources.append(
            ("teacher log-probability", streams.teacher_logprob_T, None if scores is None else scores.logprob, response)
        )
        sources += _teacher_extras(streams, scores, written, _topk_place(rollout, scores, written))
    for name, target, source, place in sources:
        if target is None:
            continue
        found, expected = None if source is None else tuple(source.shape), tuple(target[place].shape)
        if source is None or found != expected:
            raise ValueError(
                f"prompt {rollout.prompt_uid} sample {rollout.sample_index}: {name} has shape {found}, expected "
                f"{expected} ({rollout.response_len} response tokens, {len(rollout.logprobs)} written)"
            )
        target[place] = source.to(target)
    if streams.advantage_T is not None:
        if sample.advantage is None:
            raise ValueError(f"prompt {rollout.prompt_uid} sample {rollout.sample_index} has no advantage")
        streams.advantage_T[written] = sample.advantage
    if streams.sequence_error_T is not None and sample.old_logprob is not None and rollout.logprobs:
        gap = sample.old_logprob[rollout.guidance_len :] - torch.tensor(rollout.logprobs)
        streams.sequence_error_T[written] = gap.abs().exp().mean()


def _topk_place(rollout: Rollout, scores: TeacherScores | None, written: slice) -> _Place:
    """Labels that the rows of the top-k belong to.

    Raises:
        ValueError: a row is of a token that the student did not write, or they are not in order.
    """
    if scores is None or scores.topk_rows is None:
        return written
    rows = scores.topk_rows.long()
    inside = not len(rows) or (int(rows[0]) >= 0 and int(rows[-1]) < len(rollout.logprobs))
    if not inside or not bool((rows[1:] > rows[:-1]).all()):
        raise ValueError(
            f"prompt {rollout.prompt_uid} sample {rollout.sample_index}: the teacher's top-k is for tokens "
            f"{rows.tolist()[:8]}, expected ascending numbers below the {len(rollout.logprobs)} that the student wrote"
        )
    return rows + written.start


def _teacher_extras(streams: TokenStreams, scores: TeacherScores | None, written: slice, topk: _Place) -> list[_Source]:
    """Write the teacher's numbers that exist only for tokens the student wrote."""
    parts = {
        "teacher top-k ids": ("topk_ids", streams.teacher_topk_ids_TK, topk),
        "teacher top-k log-probabilities": ("topk_logprobs", streams.teacher_topk_logprob_TK, topk),
        "teacher entropy": ("entropy", streams.teacher_entropy_T, written),
        "teacher hidden states": ("hidden", streams.teacher_hidden_TH, written),
    }
    return [
        (name, target, None if scores is None else getattr(scores, field), place)
        for name, (field, target, place) in parts.items()
    ]
