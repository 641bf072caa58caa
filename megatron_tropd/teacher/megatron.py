"""A frozen Megatron model on the student's ranks, in a layout of its own: the teacher, or a reference.

Scores are made where the model's last stage is and sent to the student's last stages that train on the
rollout; no other rank sees them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.data.packing import plan_packs
from megatron_tropd.models.build import HiddenStateGPT
from megatron_tropd.ops.vocab_parallel import VocabShard
from megatron_tropd.parallel.exchange import TensorSpec, broadcast_tensors, exchange, gather_objects
from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.parallel.host_offload import HostOffload
from megatron_tropd.teacher.output_table import reshard_output_table
from megatron_tropd.teacher.scoring import FrozenHead, score_rollouts
from megatron_tropd.types import Rollout, ScoreRequest, TeacherScores


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where the scores are needed: the student's layout, and the data-parallel rank that trains on each rollout."""

    groups: ModelGroups
    owners: Mapping[int, int]

    def rank(self, index: int) -> int:
        """First tensor-parallel rank of the last stage of the replica that owns rollout ``index``."""
        layout = self.groups.layout
        return layout.rank(tp=0, pp=layout.pp - 1, dp=self.owners[index])


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
        role: Literal["teacher", "reference"] = "teacher",
    ) -> None:
        """``vocab_size``: number of ids that all models share; rows beyond them are cut off, as padding is.
        ``role``: which flags the messages name."""
        self._model = model.eval().requires_grad_(False)
        self._groups = groups
        self._max_tokens = max_tokens_per_microbatch
        self._offload = HostOffload(self._model.parameters()) if offload else None
        self._role = role
        self._shard = VocabShard(
            vocab_size=vocab_size,
            rows_per_rank=model.vocab_size // groups.layout.tp,
            group=groups.pg_collection.tp,
            chunk_tokens=logits_chunk_tokens,
        )

    @property
    def hidden_like(self) -> Tensor:
        """Return an empty tensor [0, H] with the width and dtype of the hidden states that are sent."""
        config = self._model.config
        return torch.empty(0, config.hidden_size, dtype=config.params_dtype)

    def output_rows(self, student: ModelGroups, padded_vocab_size: int) -> Tensor | None:
        """Rows of the output table for this rank's part of the student's, which has ``padded_vocab_size`` rows in all;
        see :func:`reshard_output_table`.  Collective over the world."""
        like = self.hidden_like
        with self._on_device():
            return reshard_output_table(
                self._model.lm_head_weight() if self._groups.is_last_stage else None,
                self._groups,
                student,
                width=like.shape[1],
                dtype=like.dtype,
                padded=(self._model.vocab_size, padded_vocab_size),
                vocab_size=self._shard.vocab_size,
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

    def _payload(self, rollout: Rollout, want: ScoreRequest) -> dict[str, TensorSpec]:
        """Fields of TeacherScores that are sent for ``rollout``, in order."""
        length = len(rollout.logprobs)
        specs = {"logprob": TensorSpec(shape=(rollout.response_len,), dtype=torch.float32)}
        if want.top_k:
            specs["topk_ids"] = TensorSpec(shape=(length, want.top_k), dtype=torch.int32)
            specs["topk_logprobs"] = TensorSpec(shape=(length, want.top_k), dtype=torch.float32)
        if want.entropy:
            specs["entropy"] = TensorSpec(shape=(length,), dtype=torch.float32)
        if want.hidden:
            like = self.hidden_like
            specs["hidden"] = TensorSpec(shape=(length, like.shape[1]), dtype=like.dtype)
        return specs

    def score(
        self, rollouts: Sequence[Rollout], want: ScoreRequest, destination: Destination
    ) -> dict[int, TeacherScores]:
        """Return the scores of the rollouts that this rank trains on, by rollout index.

        Raises:
            ValueError: a rollout is longer than --max-tokens-per-microbatch, or the top-k exceeds the
                vocabulary, or logits are NaN or +inf.
        """
        if want.top_k > self._shard.vocab_size:
            raise ValueError(f"--top-k {want.top_k} is larger than the vocabulary of {self._shard.vocab_size}")
        plan = plan_packs(
            [len(rollout.token_ids) for rollout in rollouts],
            data_parallel_size=self._groups.layout.dp,
            max_tokens=self._max_tokens,
            prompt_uids=[rollout.prompt_uid for rollout in rollouts],
        )
        try:
            with self._on_device():
                head = FrozenHead(model=self._model, shard=self._shard, want=want)
                scored = score_rollouts(self._model, self._groups, rollouts, plan, head, refuse_nan=True)
        except ValueError as error:  # on every rank
            flags = f"--{self._role}-hf-checkpoint / --{self._role}-load"
            raise ValueError(f"{self._role}: {error}; check {flags}") from error
        return self._route(rollouts, want, plan.owners, destination, scored)

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

    def _route(
        self,
        rollouts: Sequence[Rollout],
        want: ScoreRequest,
        owners: Mapping[int, int],
        destination: Destination,
        scored: dict[int, TeacherScores],
    ) -> dict[int, TeacherScores]:
        layout, rank = self._groups.layout, dist.get_rank()
        send: dict[int, list[Tensor]] = {}
        receive: dict[int, list[tuple[int, str, TensorSpec]]] = {}
        for index, rollout in enumerate(rollouts):
            source, target = layout.rank(tp=0, pp=layout.pp - 1, dp=owners[index]), destination.rank(index)
            specs = self._payload(rollout, want)
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
        """Broadcast from the first tensor-parallel rank of each owner to its others; {} before the last stage."""
        groups = destination.groups
        if not groups.is_last_stage:
            return {}
        owned = [i for i in range(len(rollouts)) if destination.owners[i] == groups.coords.dp]
        if groups.layout.tp > 1:
            specs = {i: self._payload(rollouts[i], want) for i in owned}
            flat = [values[i][name] for i in owned for name in specs[i]] if groups.coords.tp == 0 else None
            everything = [spec for i in owned for spec in specs[i].values()]
            tensors = iter(broadcast_tensors(flat, everything, group=groups.pg_collection.tp))
            values = {i: {name: next(tensors) for name in specs[i]} for i in owned}
        return {index: TeacherScores(**values[index]) for index in owned}
