"""Rollouts -> minibatches -> micro-batches of one constant shape.

``plan_batch`` says which rollouts make up which update, and ``plan_packs`` which data-parallel rank trains on
which of them in which micro-batch, from the lengths alone, so every rank computes the same plan without
communication.  ``pack`` builds the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd import rng
from megatron_tropd.data.streams import SampleScores, blank_streams, write_scores
from megatron_tropd.types import LabelRows, Microbatch, Needs, Region, Rollout, TokenStreams


@dataclass(frozen=True, slots=True, kw_only=True)
class PackPlan:
    """Rank and micro-batch of every rollout of a step.  The shape is the same on every rank and in every micro-batch.

    Example:
        >>> plan = plan_packs([6, 2, 3], data_parallel_size=2, max_tokens=8)
        >>> plan.microbatches, plan.num_tokens
        ((((0,),), ((2, 1),)), 6)
    """

    microbatches: tuple[tuple[tuple[int, ...], ...], ...]
    """[data-parallel rank][micro-batch] -> indices of rollouts; () for a micro-batch of padding only."""
    owners: Mapping[int, int]
    """Data-parallel rank by index of the rollout."""
    num_tokens: int
    """T, the packed length of every micro-batch."""
    fill: float
    """Share of all packed tokens that is not padding."""
    sequence_multiple_of: int = 1
    """Every sequence is padded to a multiple of it."""

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of each rank, at least 1."""
        return len(self.microbatches[0])

    def owner(self, index: int) -> int:
        """Return the data-parallel rank that trains on rollout ``index``."""
        return self.owners[index]


def plan_packs(
    lengths: Sequence[int],
    *,
    data_parallel_size: int,
    max_tokens: int,
    multiple_of: int = 1,
    sequence_multiple_of: int = 1,
    num_microbatches_multiple_of: int = 1,
    prompt_uids: Sequence[int] | None = None,
    chosen: Sequence[int] | None = None,
) -> PackPlan:
    """Assign rollouts to ranks and micro-batches.

    Rollouts go, longest first, to the least loaded rank.  First-fit-decreasing then gives the number of micro-batches
    that each rank needs; all ranks take the largest, and each spreads its rollouts evenly over that many, if they fit.
    This lowers T: with first-fit alone the first micro-batch is full, the last nearly empty, and all have the size of
    the full one.

    Args:
        lengths: tokens of each rollout, prompt included.
        data_parallel_size: number of ranks.
        max_tokens: --max-tokens-per-microbatch, the most rollout tokens in a micro-batch.
        multiple_of: T is rounded up to a multiple of it, so T may exceed ``max_tokens`` by less than this.
        sequence_multiple_of: so is the length of every sequence; it divides ``multiple_of``.
        num_microbatches_multiple_of: as ``multiple_of``, of the number of micro-batches.
        prompt_uids: prompt of each rollout, to name it in an error.
        chosen: indices of the rollouts to plan; by default all of them.

    Raises:
        ValueError: a rollout does not fit ``max_tokens``, or a size is below 1.
    """
    if min(data_parallel_size, max_tokens, multiple_of) < 1:
        raise ValueError(
            f"data_parallel_size {data_parallel_size}, --max-tokens-per-microbatch {max_tokens} and "
            f"multiple_of {multiple_of} must all be at least 1"
        )
    indices = range(len(lengths)) if chosen is None else chosen
    _check_lengths(lengths, indices, max_tokens, prompt_uids)
    longest_first = sorted(indices, key=lambda index: (-lengths[index], index))
    padded = [_round_up(length, sequence_multiple_of) for length in lengths]
    room = _round_up(max_tokens, sequence_multiple_of)
    ranks = _spread(longest_first, padded, data_parallel_size)
    first_fit = [_first_fit(rank, padded, room) for rank in ranks]
    needed = max(1, *(len(packs) for packs in first_fit))
    count = _round_up(needed, num_microbatches_multiple_of)
    microbatches = []
    for rank, packs in zip(ranks, first_fit, strict=True):
        even = _spread(rank, padded, count)
        fits = all(_load(pack, padded) <= room for pack in even)
        microbatches.append(tuple(map(tuple, even if fits else packs + [[]] * (count - len(packs)))))
    fullest = max(_load(pack, padded) for packs in microbatches for pack in packs)
    num_tokens = _round_up(max(1, fullest), multiple_of)
    return PackPlan(
        microbatches=tuple(microbatches),
        owners={index: rank for rank, packs in enumerate(microbatches) for pack in packs for index in pack},
        num_tokens=num_tokens,
        fill=_load(longest_first, lengths) / (data_parallel_size * count * num_tokens),
        sequence_multiple_of=sequence_multiple_of,
    )


def _check_lengths(
    lengths: Sequence[int], indices: Sequence[int], max_tokens: int, prompt_uids: Sequence[int] | None
) -> None:
    for index in indices:
        if not 1 <= (length := lengths[index]) <= max_tokens:
            prompt = f" of prompt {prompt_uids[index]}" if prompt_uids is not None else ""
            raise ValueError(
                f"rollout {index}{prompt} has {length} tokens; expected 1 to --max-tokens-per-microbatch {max_tokens}: "
                "raise it, or lower --max-prompt-length or --max-response-length"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """The plans of the minibatches of a rollout batch, one per update, in order."""

    minibatches: tuple[PackPlan, ...]

    @property
    def owners(self) -> dict[int, int]:
        """Data-parallel rank by index of the rollout, over all minibatches."""
        return {index: rank for plan in self.minibatches for index, rank in plan.owners.items()}


def plan_batch(
    rollouts: Sequence[Rollout],
    *,
    num_minibatches: int,
    data_parallel_size: int,
    max_tokens: int,
    multiple_of: int = 1,
    sequence_multiple_of: int = 1,
    num_microbatches_multiple_of: int = 1,
) -> BatchPlan:
    """Split the prompts evenly into minibatches, in batch order, and plan each; samples of a prompt stay together.

    Raises:
        ValueError: ``num_minibatches`` is not in 1 .. number of prompts, or for a reason of :func:`plan_packs`.
    """
    uids = [rollout.prompt_uid for rollout in rollouts]
    place = {uid: place for place, uid in enumerate(dict.fromkeys(uids))}
    if not 1 <= num_minibatches <= len(place):
        raise ValueError(f"--num-minibatches {num_minibatches}: expected 1 to the {len(place)} prompts of a batch")
    parts: list[list[int]] = [[] for _ in range(num_minibatches)]
    for index, uid in enumerate(uids):
        parts[place[uid] * num_minibatches // len(place)].append(index)
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    plans = (
        plan_packs(
            lengths, data_parallel_size=data_parallel_size, max_tokens=max_tokens, multiple_of=multiple_of,
            sequence_multiple_of=sequence_multiple_of, num_microbatches_multiple_of=num_microbatches_multiple_of,
            prompt_uids=uids, chosen=part,
        )
        for part in parts
    )  # fmt: skip
    return BatchPlan(minibatches=tuple(plans))


def _round_up(number: int, multiple_of: int) -> int:
    return -(-number // multiple_of) * multiple_of


def _load(pack: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[index] for index in pack)


def _spread(longest_first: Sequence[int], lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Put each index, in the given order, into the least loaded bin; if several are, into the first of them."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for index in longest_first:
        lightest = loads.index(min(loads))
        bins[lightest].append(index)
        loads[lightest] += lengths[index]
    return bins


def _first_fit(longest_first: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return the bins, of at most ``max_tokens`` each, that first-fit-decreasing makes."""
    bins: list[list[int]] = []
    loads: list[int] = []
    for index in longest_first:
        length = lengths[index]
        place = next((i for i, load in enumerate(loads) if load + length <= max_tokens), len(bins))
        if place == len(bins):
            bins.append([])
            loads.append(0)
        bins[place].append(index)
        loads[place] += length
    return bins


def count_regions(rollouts: Sequence[Rollout]) -> dict[str, int]:
    """Return the number of loss tokens of the rollouts by region.

    These are the numbers of GUIDANCE and ON_POLICY labels in the packed micro-batches.  A prefix counts only in
    sample 0 of its prompt; if that sample is dropped, the prefix is neither counted nor trained on.
    """
    return {
        "guidance": sum(rollout.guidance_len for rollout in rollouts if rollout.sample_index == 0),
        "on_policy": sum(len(rollout.logprobs) for rollout in rollouts),
    }


def pack(
    rollouts: Sequence[Rollout],
    sample_scores: Sequence[SampleScores] | None,
    *,
    num_tokens: int,
    sequence_multiple_of: int = 1,
    needs: Needs = Needs(),  # noqa: B008  (frozen)
    teacher_hidden: Tensor | None = None,
) -> Microbatch:
    """Return one micro-batch of exactly ``num_tokens`` tokens, on the CPU.

    Args:
        rollouts: the sequences, in packing order; if there are none, the micro-batch is padding only.
        sample_scores: numbers of each rollout; None leaves those streams blank.
        num_tokens: T of the plan.
        sequence_multiple_of: of the plan.  The padding of a sequence is at its end, where under a causal mask no
            token of it looks, and is part of the sequence in ``cu_seqlens``.
        needs: inputs of the objective; they alone decide which optional streams exist and how wide the
            top-k is, so that a micro-batch of padding has the same fields as the others.
        teacher_hidden: a tensor [0, H] with the width and dtype of the teacher's hidden states, where asked for.

    Raises:
        ValueError: the rollouts do not fit, or scores do not match ``needs`` or their rollout.
    """
    lengths = [_round_up(len(rollout.token_ids), sequence_multiple_of) for rollout in rollouts]
    if num_tokens < 1 or sum(lengths) > num_tokens:
        raise ValueError(f"{sum(lengths)} tokens do not fit a micro-batch of {num_tokens}")
    if sample_scores is not None and len(sample_scores) != len(rollouts):
        raise ValueError(f"scores of {len(sample_scores)} samples for {len(rollouts)} rollouts")
    token_T = torch.zeros(num_tokens, dtype=torch.int64)
    streams = blank_streams(num_tokens, needs, teacher_hidden)
    start = 0
    for index, rollout in enumerate(rollouts):
        _write_rollout(token_T, streams, start, rollout)
        if sample_scores is not None:
            write_scores(streams, start, rollout, sample_scores[index], needs)
        start += lengths[index]
    padding = num_tokens - sum(lengths)
    sequences = [*lengths, padding] if padding else lengths  # the padding is one last sequence
    return Microbatch(
        token_T=token_T,
        position_T=torch.cat([torch.arange(length) for length in sequences]),
        cu_seqlens=torch.tensor([0, *sequences]).cumsum(0).to(torch.int32),
        max_seqlen=max(sequences),
        streams=streams,
        rows=LabelRows.of(streams.region_T),
    )


def _write_rollout(token_T: Tensor, streams: TokenStreams, start: int, rollout: Rollout) -> None:
    """Write one rollout, without its scores, from packed position ``start`` on."""
    length = len(rollout.token_ids)
    tokens = torch.tensor(rollout.token_ids, dtype=torch.int64)
    token_T[start : start + length] = tokens
    streams.sample_uid_T[start : start + length] = rng.sample_uid(rollout.prompt_uid, rollout.sample_index)
    # The label of position t is token t + 1, so the last position of a sequence has no label.
    last = start + length - 1
    first_response = start + rollout.prompt_len - 1
    first_written = first_response + rollout.guidance_len
    streams.label_T[start:last] = tokens[1:]
    streams.label_position_T[start:last] = torch.arange(1, length)
    streams.written_len_T[start : start + length] = len(rollout.logprobs)
    streams.region_T[start:first_response] = Region.PROMPT
    streams.region_T[first_response:first_written] = (
        Region.GUIDANCE if rollout.sample_index == 0 else Region.GUIDANCE_COPY
    )
    streams.region_T[first_written:last] = Region.ON_POLICY
    if streams.sample_start_T is not None and rollout.logprobs:
        streams.sample_start_T[first_written] = True
    streams.rollout_logprob_T[first_written:last] = torch.tensor(rollout.logprobs, dtype=torch.float32)
