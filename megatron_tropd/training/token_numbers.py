"""What the loss read at each response token of the rollouts that people are shown: taken from the micro-batches where
the loss was computed, and sent to rank 0, which writes it down.

Nothing is computed a second time.  A table of numbers [R, columns], float64, travels; NaN stands for no such number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.ops.vocab_parallel import HeadOutput
from megatron_tropd.parallel.exchange import TensorSpec, exchange, gather_objects
from megatron_tropd.reports import TokenNumbers, TokenRegion
from megatron_tropd.types import Microbatch, Needs, Region

TOP = 5
"""The teacher's most probable tokens that are shown of each position."""
_NAMES = ("position", "region", "student", "teacher", "trust", "coin", "entropy")
_COLUMNS = len(_NAMES) + 2 * TOP  # ids and log-probabilities of the top follow
_REGIONS: dict[int, TokenRegion] = {
    Region.GUIDANCE: "guidance", Region.GUIDANCE_COPY: "guidance_copy", Region.ON_POLICY: "on_policy",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingTokens:
    """The labels of a micro-batch with rollouts that are shown; of what the device computed only what is needed."""

    indices: tuple[int, ...]
    """The rollouts of the micro-batch, in packing order."""
    shown: frozenset[int]
    microbatch: Microbatch
    """The part that this rank holds, on the CPU."""
    needs: Needs
    logprob_T: Tensor
    behaviour_logprob_T: Tensor | None
    trust_T: Tensor | None

    @classmethod
    def of(
        cls, indices: tuple[int, ...], shown: frozenset[int], microbatch: Microbatch, needs: Needs, out: HeadOutput
    ) -> PendingTokens | None:
        """Keep what :meth:`read` needs; None where no rollout of the micro-batch is shown."""
        if shown.isdisjoint(indices):
            return None
        return cls(
            indices=indices, shown=shown, microbatch=microbatch, needs=needs, logprob_T=out.logprob_T,
            behaviour_logprob_T=out.behaviour_logprob_T, trust_T=out.trust_T,
        )  # fmt: skip

    def read(self) -> dict[int, Tensor]:
        """Wait for the device; return the table of this rank's response tokens by index of the shown rollouts."""
        bounds, num_labels = self.microbatch.cu_seqlens, len(self.logprob_T)
        mine = (bounds // (int(bounds[-1]) // num_labels)).tolist()  # every context rank has as much of each sequence
        table, response_T = self._table(), self.microbatch.streams.region_T > Region.PROMPT
        parts = {index: slice(mine[place], mine[place + 1]) for place, index in enumerate(self.indices)}
        return {index: table[rows][response_T[rows]] for index, rows in parts.items() if index in self.shown}

    def _table(self) -> Tensor:
        streams, needs = self.microbatch.streams, self.needs
        written_T, guidance_T = (streams.region_T == region for region in (Region.ON_POLICY, Region.GUIDANCE))

        def column(value_T: Tensor | None, where_T: Tensor | None = None) -> Tensor:
            if value_T is None:
                return torch.full((len(written_T),), math.nan, dtype=torch.float64)
            value_T = value_T.cpu().double()
            return value_T if where_T is None else torch.where(where_T, value_T, math.nan)

        columns = [
            column(streams.label_position_T),
            column(streams.region_T),
            torch.where(guidance_T, column(self.logprob_T), column(self.behaviour_logprob_T, written_T)),
            column(streams.teacher_logprob_T if needs.teacher else None),
            column(self.trust_T, written_T),
            column(streams.uniform_T if needs.coin else None, written_T),
            column(streams.teacher_entropy_T, written_T),
        ]
        return torch.cat([torch.stack(columns, 1), *self._top()], 1)

    def _top(self) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities [T, TOP] of the teacher's own top-k, which is in descending order."""
        streams = self.microbatch.streams
        tops = [torch.full((len(streams.label_T), TOP), math.nan, dtype=torch.float64) for _ in range(2)]
        if streams.teacher_topk_ids_TK is not None and self.needs.topk_of == "teacher":
            assert streams.teacher_topk_logprob_TK is not None, "they come together"
            for top, source in zip(tops, (streams.teacher_topk_ids_TK, streams.teacher_topk_logprob_TK), strict=True):
                count = min(TOP, source.shape[1])
                top[:, :count] = source[:, :count]
        return tops[0], tops[1]


def send_to_rank_zero(tables: Mapping[int, Tensor]) -> dict[int, TokenNumbers]:
    """Return the numbers by rollout on rank 0, {} elsewhere.  ``tables`` are this rank's: context ranks have parts of
    one rollout.  Collective over the world."""
    order = sorted(tables)
    lengths = gather_objects({index: len(tables[index]) for index in order})
    is_zero = dist.get_rank() == 0
    receive = {
        peer: [TensorSpec(shape=(length, _COLUMNS), dtype=torch.float64) for length in of_peer.values()]
        for peer, of_peer in enumerate(lengths)
        if of_peer and is_zero
    }
    arrived = exchange({0: [tables[index] for index in order]} if order else {}, receive)
    parts: dict[int, list[Tensor]] = {}
    for peer, received in arrived.items():
        for index, part in zip(lengths[peer], received, strict=True):
            parts.setdefault(index, []).append(part)
    return {index: numbers_of(torch.cat(of_rollout)) for index, of_rollout in sorted(parts.items())}


def numbers_of(table: Tensor) -> TokenNumbers:
    """Return the numbers of one rollout's table, whose rows are in any order."""
    table = table[table[:, 0].argsort()]
    named = dict(zip(_NAMES, table.unbind(1), strict=False))
    # As the loss does it: a difference of fp32.
    reward = (named["teacher"].float() - named["student"].float()).double()
    written = named["region"] == Region.ON_POLICY
    ids, logprobs = (part.tolist() for part in table[:, len(_NAMES) :].split(TOP, 1))
    return TokenNumbers(
        region=tuple(_REGIONS[int(region)] for region in named["region"].tolist()),
        student_logprob=_known(named["student"]),
        teacher_logprob=_known(named["teacher"]),
        reward=_known(torch.where(written, reward, math.nan)),
        trust=_known(named["trust"]),
        coin=_known(named["coin"]),
        teacher_entropy=_known(named["entropy"]),
        teacher_top=tuple(_pairs(*pair) for pair in zip(ids, logprobs, strict=True)),
    )


def _known(column: Tensor) -> tuple[float | None, ...]:
    return tuple(None if math.isnan(value) else value for value in column.tolist())


def _pairs(ids: Sequence[float], logprobs: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """Return the entries with mass: a position whose top-k was not sent has none."""
    return tuple((int(i), value) for i, value in zip(ids, logprobs, strict=True) if value > -math.inf)
