"""A frozen Megatron teacher on the student's ranks, in a layout of its own.

Scores are made where the teacher's last stage is and sent to the student's last stages that train on
the rollout; no other rank sees them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_tropd.data.packing import PackPlan, pack, plan_packs
from megatron_tropd.models.build import HiddenStateGPT, forward_hidden
from megatron_tropd.ops.vocab_parallel import VocabShard, gather_hidden, teacher_scores
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.exchange import TensorSpec, broadcast_tensors, exchange
from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.types import Microbatch, Rollout, ScoreRequest, TeacherScores


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Who trains on a rollout: the student's layout and its packing plan."""

    groups: ModelGroups
    plan: PackPlan

    def rank(self, index: int) -> int:
        """First tensor-parallel rank of the last stage of the replica that owns rollout ``index``."""
        layout = self.groups.layout
        return layout.rank(tp=0, pp=layout.pp - 1, dp=self.plan.owner(index))


def payload(rollout: Rollout, want: ScoreRequest) -> dict[str, TensorSpec]:
    """Fields of TeacherScores that are sent for ``rollout``, in order."""
    length = rollout.response_len
    specs = {"logprob": TensorSpec(shape=(length,), dtype=torch.float32)}
    if want.top_k:
        specs["topk_ids"] = TensorSpec(shape=(length, want.top_k), dtype=torch.int32)
        specs["topk_logprobs"] = TensorSpec(shape=(length, want.top_k), dtype=torch.float32)
    if want.entropy:
        specs["entropy"] = TensorSpec(shape=(length,), dtype=torch.float32)
    return specs


class MegatronTeacher:
    """Scores every response token of every rollout; collective over the world."""

    def __init__(
        self,
        model: HiddenStateGPT,
        groups: ModelGroups,
        *,
        vocab_size: int,
        max_tokens_per_microbatch: int,
        logits_chunk_tokens: int,
        offload: bool = False,
    ) -> None:
        """``vocab_size``: ids both models know; rows beyond it are cut off, as padding is."""
        self._model = model.eval().requires_grad_(False)
        self._groups = groups
        self._max_tokens = max_tokens_per_microbatch
        self._offload = offload and platform.is_cuda()
        self._shard = VocabShard(
            vocab_size=vocab_size,
            rows_per_rank=model.vocab_size // groups.layout.tp,
            group=groups.pg_collection.tp,
            chunk_tokens=logits_chunk_tokens,
        )
        self._move("cpu" if self._offload else platform.device())

    def _move(self, device: Any) -> None:
        if self._offload:
            self._model.to(device)
            torch.cuda.empty_cache()

    def score(
        self, rollouts: Sequence[Rollout], want: ScoreRequest, destination: Destination
    ) -> dict[int, TeacherScores]:
        """Scores by rollout index, of those rollouts that this rank trains on.

        Raises:
            ValueError: a rollout is longer than --max-tokens-per-microbatch, or the top-k exceeds the
                vocabulary.
        """
        plan = plan_packs(
            [len(rollout.token_ids) for rollout in rollouts],
            data_parallel_size=self._groups.layout.dp,
            max_tokens=self._max_tokens,
            prompt_uids=[rollout.prompt_uid for rollout in rollouts],
        )
        self._move(platform.device())
        scored = self._forward(rollouts, want, plan)
        self._move("cpu")
        return self._route(rollouts, want, plan, destination, scored)

    @torch.no_grad()
    def _forward(self, rollouts: Sequence[Rollout], want: ScoreRequest, plan: PackPlan) -> dict[int, TeacherScores]:
        """Scores of this replica's rollouts, on the last stage; {} elsewhere."""
        mine = plan.microbatches[self._groups.coords.dp]
        batches = [pack([rollouts[i] for i in indices], None, num_tokens=plan.num_tokens) for indices in mine]
        collection = self._groups.pg_collection
        outputs = get_forward_backward_func(self._groups.layout.pp, None)(
            forward_step_func=partial(_forward_step, head=partial(self._head, want=want)),
            data_iterator=iter(batches),
            model=[self._model],
            num_microbatches=plan.num_microbatches,
            seq_length=plan.num_tokens,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
            p2p_communicator=P2PCommunicator(pp_group=collection.pp, config=self._model.config),
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
        """Scores of every response label of the micro-batch, in packed order."""
        rows = (batch.streams.region_T > 1).nonzero().squeeze(1)  # beyond PAD and PROMPT
        hidden = gather_hidden(hidden, self._shard, sequence_parallel=False).squeeze(1)[rows]
        return teacher_scores(
            hidden,
            self._model.lm_head_weight(),
            batch.streams.label_T[rows],
            self._shard,
            top_k=want.top_k,
            entropy=want.entropy,
        )

    def _route(
        self,
        rollouts: Sequence[Rollout],
        want: ScoreRequest,
        plan: PackPlan,
        destination: Destination,
        scored: dict[int, TeacherScores],
    ) -> dict[int, TeacherScores]:
        layout, rank = self._groups.layout, dist.get_rank()
        send: dict[int, list[Tensor]] = {}
        receive: dict[int, list[tuple[int, str, TensorSpec]]] = {}
        for index, rollout in enumerate(rollouts):
            source, target = layout.rank(tp=0, pp=layout.pp - 1, dp=plan.owner(index)), destination.rank(index)
            specs = payload(rollout, want)
            if source == rank:
                send.setdefault(target, []).extend(getattr(scored[index], name) for name in specs)
            if target == rank:
                receive.setdefault(source, []).extend((index, name, spec) for name, spec in specs.items())
        arrived = exchange(send, {peer: [spec for _, _, spec in wanted] for peer, wanted in receive.items()})
        values: dict[int, dict[str, Tensor]] = {}
        for peer, wanted in receive.items():
            for (index, name, _), tensor in zip(wanted, arrived[peer], strict=True):
                values.setdefault(index, {})[name] = tensor
        return self._share(rollouts, want, destination, values)

    def _share(
        self,
        rollouts: Sequence[Rollout],
        want: ScoreRequest,
        destination: Destination,
        values: dict[int, dict[str, Tensor]],
    ) -> dict[int, TeacherScores]:
        """From the first tensor-parallel rank of each owner to the others; {} before the last stage."""
        groups = destination.groups
        if not groups.is_last_stage:
            return {}
        owned = [i for i in range(len(rollouts)) if destination.plan.owner(i) == groups.coords.dp]
        if groups.layout.tp > 1:
            specs = {i: payload(rollouts[i], want) for i in owned}
            flat = [values[i][name] for i in owned for name in specs[i]] if groups.coords.tp == 0 else None
            everything = [spec for i in owned for spec in specs[i].values()]
            tensors = iter(broadcast_tensors(flat, everything, group=groups.pg_collection.tp))
            values = {i: {name: next(tensors) for name in specs[i]} for i in owned}
        return {index: TeacherScores(**values[index]) for index in owned}


def _forward_step(batches: Any, model: torch.nn.Module, head: Any) -> tuple[Tensor, Any]:
    """Megatron's forward-step contract, for a schedule that only collects."""
    batch: Microbatch = next(batches).to(platform.device())
    return forward_hidden(model, batch), lambda hidden, non_loss_data=True: head(hidden, batch)


def _rows(scores: TeacherScores, start: int, stop: int) -> TeacherScores:
    """One rollout's part of a micro-batch's scores."""
    parts = {f.name: getattr(scores, f.name) for f in fields(scores)}
    return TeacherScores(**{name: None if v is None else v[start:stop] for name, v in parts.items()})
