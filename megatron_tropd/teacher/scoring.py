"""Numbers of every response token from a forward pass alone, by any model in any layout: the teacher, the
reference, and the student itself before its first update on a batch."""

from __future__ import annotations

from collections.abc import Sequence
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
from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.types import Microbatch, Region, Rollout, ScoreRequest, TeacherScores


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """A model that is asked for numbers and not changed."""

    model: HiddenStateGPT
    groups: ModelGroups
    shard: VocabShard

    @torch.no_grad()
    def forward(self, rollouts: Sequence[Rollout], plan: PackPlan, want: ScoreRequest) -> dict[int, TeacherScores]:
        """Scores by rollout index of this replica's part of ``plan``, on every rank of its last stage; {} elsewhere.

        Collective over the model's ranks.
        """
        mine = plan.microbatches[self.groups.coords.dp]
        batches = [pack([rollouts[i] for i in indices], None, num_tokens=plan.num_tokens) for indices in mine]
        collection = self.groups.pg_collection

        def forward_step(batches: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
            """Megatron's contract, for a schedule that only collects."""
            batch: Microbatch = next(batches).to(platform.device())
            return forward_hidden(model, batch), lambda hidden, non_loss_data=True: self._head(hidden, batch, want)

        outputs = get_forward_backward_func(self.groups.layout.pp, None)(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[self.model],
            num_microbatches=plan.num_microbatches,
            seq_length=plan.num_tokens,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
            p2p_communicator=P2PCommunicator(pp_group=collection.pp, config=self.model.config),
            pg_collection=collection,
        )
        scored = {}
        for indices, scores in zip(mine, outputs, strict=False):  # no outputs before the last stage
            start = 0
            for index in indices:
                stop = start + rollouts[index].response_len
                scored[index] = _rows(scores, start, stop)
                start = stop
        return scored

    def _head(self, hidden: Tensor, batch: Microbatch, want: ScoreRequest) -> TeacherScores:
        """Scores of every response label of the micro-batch, in packed order, on the CPU."""
        rows = (batch.streams.region_T > Region.PROMPT).nonzero().squeeze(1)
        sequence_parallel = self.model.config.sequence_parallel
        hidden = gather_hidden(hidden, self.shard, sequence_parallel=sequence_parallel).squeeze(1)[rows]
        scores = teacher_scores(
            hidden,
            self.model.lm_head_weight(),
            batch.streams.label_T[rows],
            self.shard,
            top_k=want.top_k,
            entropy=want.entropy,
        )
        return _map(replace(scores, hidden=hidden if want.hidden else None), Tensor.cpu)


def _map(scores: TeacherScores, change: Any) -> TeacherScores:
    parts = {f.name: getattr(scores, f.name) for f in fields(scores)}
    return TeacherScores(**{name: None if value is None else change(value) for name, value in parts.items()})


def _rows(scores: TeacherScores, start: int, stop: int) -> TeacherScores:
    """One rollout's part of a micro-batch's scores."""
    return _map(scores, lambda value: value[start:stop])
