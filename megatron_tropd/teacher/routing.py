"""Sends scores from the ranks where they were made to the student's ranks that train on the rollouts.

Scores go to the first rank of the last stage of the replica that owns a rollout, and from there to the other tensor-
and context-parallel ranks of that stage; a context rank writes them into streams of whole sequences, and cuts those.
No other rank sees them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.parallel.exchange import TensorSpec, broadcast_tensors, exchange
from megatron_tropd.teacher.scorer import Destination
from megatron_tropd.types import Rollout, ScoreRequest, TeacherScores


def payload(
    rollout: Rollout, want: ScoreRequest, hidden_like: Tensor | None, topk_rows: int | None = None
) -> dict[str, TensorSpec]:
    """Fields of TeacherScores that are sent for ``rollout``, in order; ``topk_rows`` is the number of its tokens with a
    top-k, None where all that the student wrote have one."""
    length = len(rollout.logprobs)
    specs = {"logprob": TensorSpec(shape=(rollout.response_len,), dtype=torch.float32)}
    if want.top_k:
        rows = length if topk_rows is None else topk_rows
        if topk_rows is not None:
            specs["topk_rows"] = TensorSpec(shape=(rows,), dtype=torch.int32)
        specs["topk_ids"] = TensorSpec(shape=(rows, want.top_k), dtype=torch.int32)
        specs["topk_logprobs"] = TensorSpec(shape=(rows, want.top_k), dtype=torch.float32)
    if want.entropy:
        specs["entropy"] = TensorSpec(shape=(length,), dtype=torch.float32)
    if want.hidden:
        assert hidden_like is not None, "asked for hidden states of a scorer that sends none"
        specs["hidden"] = TensorSpec(shape=(length, hidden_like.shape[1]), dtype=hidden_like.dtype)
    return specs


def payloads(
    rollouts: Mapping[int, Rollout], want: ScoreRequest, hidden_like: Tensor | None, topk_rows: Mapping[int, int]
) -> dict[int, dict[str, TensorSpec]]:
    """:func:`payload` by index of the rollout; ``topk_rows`` is that of ``Located``."""
    return {index: payload(rollout, want, hidden_like, topk_rows.get(index)) for index, rollout in rollouts.items()}


def bytes_per_token(rollouts: Mapping[int, Rollout], specs: Mapping[int, Mapping[str, TensorSpec]]) -> float:
    """Return the bytes of all scores of ``rollouts`` by their response tokens."""
    num_bytes = sum(spec.num_bytes for of_rollout in specs.values() for spec in of_rollout.values())
    return num_bytes / max(sum(rollout.response_len for rollout in rollouts.values()), 1)


def flatten(
    scored: Mapping[int, TeacherScores], indices: Sequence[int], specs: Mapping[int, Mapping[str, TensorSpec]]
) -> list[Tensor]:
    """Return the tensors of the rollouts ``indices``, in the order in which :func:`unflatten` reads them."""
    return [getattr(scored[index], name) for index in indices for name in specs[index]]


def unflatten(
    tensors: Sequence[Tensor], indices: Sequence[int], specs: Mapping[int, Mapping[str, TensorSpec]]
) -> dict[int, TeacherScores]:
    """Return the scores of the rollouts ``indices`` from the tensors of :func:`flatten`."""
    rest = iter(tensors)
    return {index: TeacherScores(**{name: next(rest) for name in specs[index]}) for index in indices}


def route(
    scored: Mapping[int, TeacherScores],
    sources: Mapping[int, int],
    rollouts: Mapping[int, Rollout],
    specs: Mapping[int, Mapping[str, TensorSpec]],
    destination: Destination,
) -> dict[int, TeacherScores]:
    """Return the scores of the rollouts that this rank trains on.  Collective over the student's ranks.

    Args:
        scored: what this rank holds, by rollout index.
        sources: for every rollout, the rank that holds its scores.
        rollouts: all that were scored, by their index in the batch, in one order on all ranks.
        specs: what is sent of each, as :func:`payloads` gives it.
        destination: who trains on what.
    """
    rank = dist.get_rank()
    send: dict[int, list[int]] = {}
    receive: dict[int, list[int]] = {}
    for index in rollouts:
        source, target = sources[index], destination.rank(index)
        if source == rank:
            send.setdefault(target, []).append(index)
        if target == rank:
            receive.setdefault(source, []).append(index)
    arrived = exchange(
        {peer: flatten(scored, indices, specs) for peer, indices in send.items()},
        {peer: [s for i in indices for s in specs[i].values()] for peer, indices in receive.items()},
    )
    mine: dict[int, TeacherScores] = {}
    for peer, indices in receive.items():
        mine |= unflatten(arrived[peer], indices, specs)
    return share(mine, rollouts, specs, destination)


def share(
    mine: Mapping[int, TeacherScores],
    rollouts: Mapping[int, Rollout],
    specs: Mapping[int, Mapping[str, TensorSpec]],
    destination: Destination,
) -> dict[int, TeacherScores]:
    """Broadcast what arrived at the first rank of each owner's last stage to its others; {} before the last stage.

    Collective over the student's ranks.
    """
    groups = destination.groups
    if not groups.is_last_stage:
        return {}
    owned = [i for i in rollouts if destination.owners[i] == groups.coords.dp]
    layout, collection = groups.layout, groups.pg_collection
    if layout.tp * layout.cp == 1:
        return {index: mine[index] for index in owned}
    flat = flatten(mine, owned, specs) if groups.reports_replica else None
    everything = [spec for i in owned for spec in specs[i].values()]
    group = collection.tp if layout.cp == 1 else collection.tp_cp
    return unflatten(broadcast_tensors(flat, everything, group=group), owned, specs)
