"""A frozen Megatron model in a layout of its own: the teacher, or a reference.  Scores are made where its last stage
is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_tropd.data.packing import plan_packs
from megatron_tropd.models.build import HiddenStateGPT
from megatron_tropd.ops.vocab_parallel import VocabShard
from megatron_tropd.parallel.exchange import WORLD, Link, gather_objects
from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.parallel.host_offload import HostOffload
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.teacher.output_table import Grid, reshard_output_table
from megatron_tropd.teacher.routing import bytes_per_token, payloads, route
from megatron_tropd.teacher.scorer import Destination
from megatron_tropd.teacher.scoring import FrozenHead, score_rollouts
from megatron_tropd.teacher.topk_selection import count_topk_rows, select_topk
from megatron_tropd.types import Rollout, ScoreRequest, TeacherScores


@dataclass(frozen=True, slots=True, kw_only=True)
class Located:
    """Scores where they were made, before they are sent to the student's ranks."""

    scores: dict[int, TeacherScores]
    """By rollout index, of this rank's replica, on every rank of its last stage; {} elsewhere."""
    sources: Mapping[int, int]
    """For every rollout, the rank that sends its scores: the first tensor-parallel rank of the last stage."""
    topk_rows: Mapping[int, int] = field(default_factory=dict)
    """By rollout index, on every rank: tokens with a top-k, where the request says which need it; {} where all have."""


class MegatronTeacher:
    """A frozen model on all ranks of a world, the student's or its own."""

    def __init__(
        self,
        model: HiddenStateGPT,
        groups: ModelGroups,
        *,
        vocab_size: int,
        max_tokens_per_microbatch: int,
        logits_chunk_tokens: int,
        offload: bool = False,
        role: Literal["teacher", "reference"] = "teacher",
    ) -> None:
        """``vocab_size``: number of ids that all models share; rows beyond them are cut off, as padding is.
        ``role``: which flags the messages name."""
        self._model = model.eval().requires_grad_(False)
        self._groups = groups
        self._max_tokens = max_tokens_per_microbatch
        self._offload = HostOffload(self._model.parameters()) if offload else None
        self._role = role
        self.payload_bytes_per_token = 0.0
        """Bytes that the last :meth:`score` sent to the ranks that train, by response token of the batch."""
        self._shard = VocabShard(
            vocab_size=vocab_size,
            rows_per_rank=model.vocab_size // groups.layout.tp,
            group=groups.pg_collection.tp,
            chunk_tokens=logits_chunk_tokens,
        )

    @property
    def layout(self) -> ParallelLayout:
        """Layout of the model."""
        return self._groups.layout

    @property
    def max_tokens(self) -> int:
        """Most tokens of one micro-batch."""
        return self._max_tokens

    @property
    def hidden_like(self) -> Tensor:
        """Return an empty tensor [0, H] with the width and dtype of the hidden states that are sent."""
        config = self._model.config
        return torch.empty(0, config.hidden_size, dtype=config.params_dtype)

    def output_rows(
        self, student: Grid, padded_vocab_size: int, *, first: int = 0, link: Link = WORLD
    ) -> Tensor | None:
        """Rows of the output table for this rank's part of the student's, which has ``padded_vocab_size`` rows in all;
        see :func:`reshard_output_table`.  Collective over this model's ranks, numbered from ``first`` on ``link``, and
        the student's."""
        like = self.hidden_like
        with self._on_device():
            return reshard_output_table(
                self._model.lm_head_weight() if self._groups.is_last_stage else None,
                Grid(layout=self._groups.layout, first=first),
                student,
                width=like.shape[1],
                dtype=like.dtype,
                padded=(self._model.vocab_size, padded_vocab_size),
                vocab_size=self._shard.vocab_size,
                link=link,
            )

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """Have the weights on this rank's device, also those that are in host memory between uses."""
        if self._offload is None:
            yield
            return
        self._offload.load()
        try:
            yield
        finally:
            self._offload.release()

    def score_here(self, rollouts: Mapping[int, Rollout], want: ScoreRequest) -> Located:
        """Score every response token of rollouts by index; the scores stay where they were made.  Collective over the
        model's ranks.

        Raises:
            ValueError: on every rank: a rollout is longer than --max-tokens-per-microbatch, or the top-k exceeds the
                vocabulary, or logits are NaN or +inf.
        """
        if want.top_k > self._shard.vocab_size:
            raise ValueError(f"--top-k {want.top_k} is larger than the vocabulary of {self._shard.vocab_size}")
        layout = self._groups.layout
        indices, ordered = list(rollouts), list(rollouts.values())
        plan = plan_packs(
            [len(rollout.token_ids) for rollout in ordered],
            data_parallel_size=layout.dp,
            max_tokens=self._max_tokens,
            prompt_uids=[rollout.prompt_uid for rollout in ordered],
        )
        try:
            with self._on_device():
                head = FrozenHead(model=self._model, shard=self._shard, want=want)
                found = score_rollouts(
                    self._model, self._groups, ordered, plan, head, refuse_nan=True,
                    given_top_k=want.top_k if want.topk_of == "student" else 0,
                )  # fmt: skip
        except ValueError as error:  # on every rank
            flags = f"--{self._role}-hf-checkpoint / --{self._role}-load"
            raise ValueError(f"{self._role}: {error}; check {flags}") from error
        scored = {indices[place]: scores for place, scores in found.items()}
        sources = {
            indices[place]: layout.rank(tp=0, pp=layout.pp - 1, dp=owner) for place, owner in plan.owners.items()
        }
        if want.topk_use is None:
            return Located(scores=scored, sources=sources)
        chosen = {index: select_topk(scores, rollouts[index], want.topk_use) for index, scores in scored.items()}
        return Located(scores=chosen, sources=sources, topk_rows=count_topk_rows(chosen))

    def score(
        self, rollouts: Mapping[int, Rollout], want: ScoreRequest, destination: Destination
    ) -> dict[int, TeacherScores]:
        """:meth:`score_here`, and send the scores to the ranks that train on the rollouts: a model on the student's own
        ranks."""
        located = self.score_here(rollouts, want)
        specs = payloads(rollouts, want, self.hidden_like, located.topk_rows)
        self.payload_bytes_per_token = bytes_per_token(rollouts, specs)
        return route(located.scores, located.sources, rollouts, specs, destination)

    def logprobs_of(self, sequences: Sequence[Sequence[int]], *, vocab_size: int) -> list[list[float]]:
        """Return the log-probability [nats] of every token but the first, over ``vocab_size`` ids, on every rank.

        Collective over the world.

        Raises:
            ValueError: logits are NaN or +inf.
        """
        rollouts = [
            Rollout(
                prompt_uid=index, sample_index=0, token_ids=tuple(token_ids), prompt_len=1, guidance_len=0,
                logprobs=(0.0,) * (len(token_ids) - 1), weight_version=(0, 0), finish="length",
            )
            for index, token_ids in enumerate(sequences)
        ]  # fmt: skip
        lengths = [len(token_ids) for token_ids in sequences]
        plan = plan_packs(
            lengths, data_parallel_size=self._groups.layout.dp, max_tokens=max(self._max_tokens, *lengths)
        )
        shard = replace(self._shard, vocab_size=vocab_size)
        with self._on_device():
            head = FrozenHead(model=self._model, shard=shard, want=ScoreRequest())
            scored = score_rollouts(self._model, self._groups, rollouts, plan, head, refuse_nan=True)
        mine = {index: scores.logprob.tolist() for index, scores in scored.items() if self._groups.reports}
        found = {index: values for part in gather_objects(mine) for index, values in part.items()}
        return [found[index] for index in range(len(rollouts))]
