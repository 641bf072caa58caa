"""Numbers of every response token from a forward pass alone, by any model in any layout: the teacher, the
reference, and the student itself before its first update on a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_tropd.data.packing import PackPlan, pack
from megatron_tropd.models.build import HiddenStateGPT, forward_hidden
from megatron_tropd.models.chunks import ModelChunks
from megatron_tropd.models.context import held_part
from megatron_tropd.ops.vocab_parallel import VocabShard, gather_hidden, nan_problem, unchecked_teacher_scores
from megatron_tropd.parallel import host_copies, platform
from megatron_tropd.parallel.fail_together import on_all_ranks
from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.teacher.context import whole_scores
from megatron_tropd.types import Microbatch, Rollout, ScoreRequest, TeacherScores

Head = Callable[[Tensor, Microbatch], TeacherScores]
"""(output of the last stage, micro-batch) -> log-probabilities of its response tokens (``LabelRows.response``) and
everything else of those the student wrote (``LabelRows.written``), in packed order.  It must not wait for the device,
nor raise: other stages would wait."""


@torch.no_grad()
def score_rollouts(
    model: HiddenStateGPT | ModelChunks,
    groups: ModelGroups,
    rollouts: Sequence[Rollout],
    plan: PackPlan,
    head: Head,
    *,
    refuse_nan: bool = False,
    given_top_k: int = 0,
) -> dict[int, TeacherScores]:
    """Scores by rollout index of this replica's part of ``plan``, on the CPU of every rank of its last stage; {}
    elsewhere.  Collective over the world.

    With ``given_top_k`` the head finds the ids that the rollouts bring in the stream ``teacher_topk_ids_TK``.

    The host runs ahead of the device: micro-batches go to it, and scores come back, by copies from and to pinned
    memory, and the host waits for the last.  (Megatron's experts and pipeline stages wait in every layer and message.)

    Raises:
        ValueError: on every rank: a rollout lacks ids or, with ``refuse_nan``, is given a NaN; it names the prompts.
    """
    mine = plan.microbatches[groups.coords.dp]
    batches = _pack_all(rollouts, plan, mine, given_top_k)

    def forward_step(batches: Any, model: torch.nn.Module) -> tuple[Tensor, Any]:
        """Return output and loss function as Megatron's schedule requires; the loss function only collects."""
        whole: Microbatch = next(batches)
        part = held_part(whole, groups)
        batch = host_copies.pinned(part).to(platform.device())
        return forward_hidden(model, batch), lambda hidden, non_loss_data=True: _map(
            whole_scores(head(hidden, batch), whole, part, groups), host_copies.begin_copy_to_host
        )

    collection = groups.pg_collection
    chunks = list(model.chunks) if isinstance(model, ModelChunks) else [model]
    outputs = get_forward_backward_func(groups.layout.pp, groups.layout.vpp)(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks],
        model=chunks,
        num_microbatches=plan.num_microbatches,
        seq_length=plan.num_tokens,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
        p2p_communicator=P2PCommunicator(pp_group=collection.pp, config=model.config),
        pg_collection=collection,
    )
    host_copies.synchronize()  # the copies have arrived
    if refuse_nan:
        on_all_ranks(lambda: _refuse_nan(rollouts, mine, outputs), ValueError)
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


def _pack_all(
    rollouts: Sequence[Rollout], plan: PackPlan, mine: Sequence[Sequence[int]], given_top_k: int
) -> list[Microbatch]:
    """Pack this replica's micro-batches; with ``given_top_k`` collective over the world, because it may fail."""

    def packed() -> list[Microbatch]:
        return [_pack([rollouts[i] for i in indices], plan, given_top_k) for indices in mine]

    return on_all_ranks(packed, ValueError) if given_top_k else packed()


def _pack(rollouts: Sequence[Rollout], plan: PackPlan, given_top_k: int) -> Microbatch:
    """Pack one micro-batch; with ``given_top_k`` with the ids that the rollouts bring in the stream of the teacher's
    top-k, where it scores them.

    Raises:
        ValueError: a rollout brings none, or another number.
    """
    batch = pack(rollouts, None, num_tokens=plan.num_tokens, sequence_multiple_of=plan.sequence_multiple_of)
    if not given_top_k:
        return batch
    for rollout in rollouts:
        found = None if rollout.topk_ids is None else tuple(rollout.topk_ids.shape)
        if rollout.logprobs and found != (len(rollout.logprobs), given_top_k):
            raise ValueError(
                f"prompt {rollout.prompt_uid} sample {rollout.sample_index} brings the student's top-k as {found}; "
                f"expected {(len(rollout.logprobs), given_top_k)}"
            )
    ids_TK = torch.zeros(len(batch.streams.label_T), given_top_k, dtype=torch.int64)
    given = [rollout.topk_ids for rollout in rollouts if rollout.topk_ids is not None]
    if given:
        ids_TK[batch.rows.written] = torch.cat(given).long()
    return replace(batch, streams=replace(batch.streams, teacher_topk_ids_TK=ids_TK))


def _refuse_nan(
    rollouts: Sequence[Rollout], microbatches: Sequence[Sequence[int]], outputs: Sequence[TeacherScores]
) -> None:
    failures = []
    for indices, scores in zip(microbatches, outputs, strict=False):  # no outputs before the last stage
        if problem := nan_problem(scores.logprob):
            prompts = sorted({rollouts[index].prompt_uid for index in indices})
            failures.append(f"prompts {', '.join(map(str, prompts))}: {problem}")
    if failures:
        raise ValueError("; ".join(failures))


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenHead:
    """The head of a frozen model: log-probabilities without a gradient."""

    model: HiddenStateGPT
    shard: VocabShard
    want: ScoreRequest

    def __call__(self, hidden: Tensor, batch: Microbatch) -> TeacherScores:
        """See :data:`Head`."""
        hidden = gather_hidden(hidden, self.shard, sequence_parallel=False).squeeze(1)
        prefix, written = batch.rows.prefix, batch.rows.written
        ids_TK = batch.streams.teacher_topk_ids_TK
        at = None if ids_TK is None else ids_TK[written]
        scores = self._score(hidden[written], batch.streams.label_T[written], self.want, at)
        logprob_T = torch.zeros(len(hidden), device=hidden.device)
        logprob_T[written] = scores.logprob
        logprob_T[prefix] = self._score(hidden[prefix], batch.streams.label_T[prefix], ScoreRequest()).logprob
        return replace(
            scores,
            logprob=logprob_T[batch.rows.response],
            hidden=hidden[written] if self.want.hidden else None,
        )

    def _score(self, hidden: Tensor, labels: Tensor, want: ScoreRequest, at: Tensor | None = None) -> TeacherScores:
        return unchecked_teacher_scores(
            hidden, self.model.lm_head_weight(), labels, self.shard, top_k=want.top_k, entropy=want.entropy, at=at
        )


def _map(scores: TeacherScores, change: Callable[[Tensor], Tensor]) -> TeacherScores:
    parts: dict[str, Any] = {f.name: getattr(scores, f.name) for f in fields(scores)}
    changed: dict[str, Any] = {name: None if value is None else change(value) for name, value in parts.items()}
    return TeacherScores(**changed)
