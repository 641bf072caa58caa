"""Numbers of every response token from a forward pass alone, by any model in any layout: the teacher, the
reference, and the student itself before its first update on a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_tropd.data.packing import PackPlan, pack
from megatron_tropd.models.build import HiddenStateGPT, forward_hidden
from megatron_tropd.ops.vocab_parallel import VocabShard, gather_hidden, teacher_scores
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.exchange import gather_objects
from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.types import Microbatch, Region, Rollout, ScoreRequest, TeacherScores

Head = Callable[[Tensor, Microbatch], TeacherScores]
"""(output of the last stage, micro-batch) -> scores of its :func:`response_rows`, in packed order."""


def response_rows(batch: Microbatch) -> Tensor:
    """Packed positions of the labels that are response tokens, int64 [N]."""
    return (batch.streams.region_T > Region.PROMPT).nonzero().squeeze(1)


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
    failures: list[str] = []
    guarded = _Guarded(head=head, failures=failures)

    def forward_step(batches: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
        """Megatron's contract, for a schedule that only collects."""
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
    if failures := sorted({failure for of_rank in gather_objects(failures) for failure in of_rank}):
        raise ValueError("; ".join(failures))
    scored = {}
    for indices, scores in zip(mine, outputs, strict=False):  # no outputs before the last stage
        start = 0
        for index in indices:
            stop = start + rollouts[index].response_len
            scored[index] = _map(scores, lambda value, rows=slice(start, stop): value[rows])
            start = stop
    return scored


@dataclass(frozen=True, slots=True, kw_only=True)
class _Guarded:
    """A head that notes what is wrong instead of leaving a schedule whose other stages wait for it."""

    head: Head
    failures: list[str]

    def __call__(self, hidden: Tensor, batch: Microbatch) -> TeacherScores:
        try:
            return _map(self.head(hidden, batch), Tensor.cpu)
        except ValueError as error:
            uids = batch.streams.sample_uid_T[response_rows(batch)].unique() >> 20
            self.failures.append(f"prompts {', '.join(map(str, uids.unique().tolist()))}: {error}")
            return TeacherScores(logprob=torch.empty(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenHead:
    """The head of a model that is only asked."""

    model: HiddenStateGPT
    shard: VocabShard
    want: ScoreRequest

    def __call__(self, hidden: Tensor, batch: Microbatch) -> TeacherScores:
        """See :data:`Head`."""
        rows = response_rows(batch)
        hidden = gather_hidden(hidden, self.shard, sequence_parallel=False).squeeze(1)[rows]
        scores = teacher_scores(
            hidden,
            self.model.lm_head_weight(),
            batch.streams.label_T[rows],
            self.shard,
            top_k=self.want.top_k,
            entropy=self.want.entropy,
        )
        return replace(scores, hidden=hidden if self.want.hidden else None)


def _map(scores: TeacherScores, change: Callable[[Tensor], Tensor]) -> TeacherScores:
    parts = {f.name: getattr(scores, f.name) for f in fields(scores)}
    return TeacherScores(**{name: None if value is None else change(value) for name, value in parts.items()})
