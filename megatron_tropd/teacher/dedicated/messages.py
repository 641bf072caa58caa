"""What the trainer and a teacher with ranks of its own tell each other.

    trainer -> teacher   score      rollouts of a batch, as they finish
                         deliver    the whole batch was sent: send the scores to these ranks
                         logprobs   score sequences that are no rollouts
                         table      send the rows of the output table
                         stopping   the run has saved, and ends before its last step
                         stop
    teacher -> trainer   ready      the model is loaded
                         scored     which rank sends the scores of which rollout, and how many tokens of it have a top-k
                                    where the request says which need it; follows ``deliver``
                         logprobs
                         failed     the batch, or the sequences, cannot be scored
                         stopped

Scores themselves, and rows of the table, go from rank to rank over the bridge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_tropd.data.rollout_codec import decode_rollouts, encode_rollouts
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.parallel.mailbox import Message
from megatron_tropd.types import Rollout, ScoreRequest, TopkUse


def inbox(teacher: str) -> str:
    """Name of the mailbox that the teacher's first rank reads."""
    return f"{teacher}/in"


def outbox(teacher: str) -> str:
    """Name of the mailbox that the trainer's first rank reads."""
    return f"{teacher}/out"


def score_message(step: int, rollouts: Mapping[int, Rollout], want: ScoreRequest) -> Message:
    """Return the message ``score``."""
    values = {"step": step, "indices": list(rollouts), "want": asdict(want)}
    return Message(kind="score", values=values, data=encode_rollouts(list(rollouts.values())).numpy().tobytes())


def read_score(message: Message) -> tuple[int, dict[int, Rollout], ScoreRequest]:
    """Return (step, rollouts by index, what is wanted)."""
    values = message.values
    rollouts = dict(zip(values["indices"], decode_rollouts(message.data), strict=True))
    want = dict(values["want"])
    if want["topk_use"] is not None:
        want["topk_use"] = TopkUse(**want["topk_use"])
    return values["step"], rollouts, ScoreRequest(**want)


def deliver_message(step: int, targets: Mapping[int, int]) -> Message:
    """Return the message ``deliver``: ``targets`` are ranks of the job, by index of the rollout."""
    return Message(kind="deliver", values={"step": step, "targets": pairs(targets)})


def pairs(values: Mapping[int, int]) -> list[tuple[int, int]]:
    """Return a mapping as messages have it: JSON has no integers as keys.  ``dict`` reads it."""
    return list(values.items())


def table_message(layout: ParallelLayout, first: int, padded_vocab_size: int) -> Message:
    """Return the message ``table``: the student's layout, the job's rank of its rank 0, and the rows of its table."""
    values = {"layout": asdict(layout), "first": first, "padded_vocab_size": padded_vocab_size}
    return Message(kind="table", values=values)


def stopping_message(why: str) -> Message:
    """Return the message ``stopping``: what asked the run to."""
    return Message(kind="stopping", values={"why": why})


def layout_of(values: Mapping[str, Any]) -> ParallelLayout:
    """Return the layout in the message ``table``."""
    return ParallelLayout(**values["layout"])
