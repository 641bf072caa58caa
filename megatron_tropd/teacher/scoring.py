"""Numbers of every response token from a forward pass alone, by any model in any layout: the teacher, the
reference, and the student itself before its first update on a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import itemgetter
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_tropd.data.packing import PackPlan, pack
from megatron_tropd.models.build import HiddenStateGPT, forward_hidden
from megatron_tropd.ops.vocab_parallel import VocabShard, gather_hidden, teacher_scores
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.fail_together import on_all_ranks
from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.rng import split_sample_uid
from megatron_tropd.types import Microbatch, Region, Rollout, ScoreRequest, TeacherScores

Head = Callable[[Tensor, Microbatch], TeacherScores]
"""(output of the last stage, micro-batch) -> log-probabilities of its :func:`response_rows` and everything else of
its :func:`written_rows`, in packed order."""


def response_rows(batch: Microbatch) -> Tensor:
    """Packed positions of the labels that are response tokens, int64 [R]."""
    return (batch.streams.region_T > Region.PROMPT).nonzero().squeeze(1)


def written_rows(batch: Microbatch) -> Tensor:
    """Packed positions of the labels that the student wrote, int64 [W]."""
    return (batch.streams.region_T == Region.ON_POLICY).nonzero().squeeze(1)


@torch.no_grad()
def score_rollouts(
    model: HiddenStateGPT, groups: ModelGroups, rollouts: Sequence[Rollout], plan: PackPlan, head: Head
) -> dict[int, TeacherScores]:
    """Scores by rollout index of this replica's part of ``plan``, on the CPU of every rank of its last stage; {}
    elsewhere.  Collective over the world.

    Raises:
        ValueError: on every rank, where ``head`` raised one on any; the message names the prompts.
    """
    mine = plan.microbatches[groups.coords.dp]
    batches = [pack([rollouts[i] for i in indices], None, num_tokens=plan.num_tokens) for indices in mine]
    guarded = _Guarded(head=head)

    def forward_step(batches: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
        """Return output and loss function as Megatron's schedule requires; the loss function only collects."""
        batch: Microbatch = next(batches).to(platform.device())
        return forward_hidden(model, batch), lambda hidden, non_loss_data=True: guarded(hidden, batch)

    collection = groups.pg_collection
    outputs = get_forward_backward_func(groups.layout.pp, None)(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=plan.num_microbatches,
        seq_length=plan.num_tokens,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
        p2p_communicator=P2PCommunicator(pp_group=collection.pp, config=model.config),
        pg_collection=collection,
    )
    on_all_ranks(guarded.raise_failures, ValueError)
    scored = {}
    for indices, scores in zip(mine, outputs, strict=False):  # no outputs before the last stage
        response = written = 0
        for index in indices:
            rollout = rollouts[index]
            rows = slice(written, written := written + len(rollout.logprobs))
            part = _map(scores, itemgetter(rows))
            logprob = scores.logprob[response : (response := response + rollout.response_len)]
            scored[index] = replace(part, logprob=logprob)
    return scored


@dataclass(frozen=True, slots=True, kw_only=True)
class _Guarded:
    """A head that records an error instead of raising it inside a pipeline schedule, where other stages would wait."""

    head: Head
    failures: list[str] = field(default_factory=list)

    def raise_failures(self) -> None:
        """Raise the errors that were recorded on this rank; called after the schedule has ended."""
        if self.failures:
            raise ValueError("; ".join(self.failures))

    def __call__(self, hidden: Tensor, batch: Microbatch) -> TeacherScores:
        try:
            return _map(self.head(hidden, batch), Tensor.cpu)
        except ValueError as error:
            samples = batch.streams.sample_uid_T[response_rows(batch)].unique().tolist()
            prompts = sorted({split_sample_uid(uid)[0] for uid in samples})
            self.failures.append(f"prompts {', '.join(map(str, prompts))}: {error}")
            return TeacherScores(logprob=torch.empty(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenHead:
    """The head of a frozen model: log-probabilities without a gradient."""

    model: HiddenStateGPT
    shard: VocabShard
    want: ScoreRequest

    def __call__(self, hidden: Tensor, batch: Microbatch) -> TeacherScores:
        """See :data:`Head`."""
        hidden = gather_hidden(hidden, self.shard, sequence_parallel=False).squeeze(1)
        region_T = batch.streams.region_T
        prefix = ((region_T == Region.GUIDANCE) | (region_T == Region.GUIDANCE_COPY)).nonzero().squeeze(1)
        written = written_rows(batch)
        scores = self._score(hidden[written], batch.streams.label_T[written], self.want)
        logprob_T = torch.zeros(len(hidden), device=hidden.device)
        logprob_T[written] = scores.logprob
        logprob_T[prefix] = self._score(hidden[prefix], batch.streams.label_T[prefix], ScoreRequest()).logprob
        return replace(
            scores,
            logprob=logprob_T[response_rows(batch)],
            hidden=hidden[written] if self.want.hidden else None,
        )

    def _score(self, hidden: Tensor, labels: Tensor, want: ScoreRequest) -> TeacherScores:
        weight = self.model.lm_head_weight()
        return teacher_scores(hidden, weight, labels, self.shard, top_k=want.top_k, entropy=want.entropy)


def _map(scores: TeacherScores, change: Callable[[Tensor], Tensor]) -> TeacherScores:
    parts: dict[str, Any] = {f.name: getattr(scores, f.name) for f in fields(scores)}
    changed: dict[str, Any] = {name: None if value is None else change(value) for name, value in parts.items()}
    return TeacherScores(**changed)
