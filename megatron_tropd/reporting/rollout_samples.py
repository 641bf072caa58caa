"""A few rollouts of a step as text, one JSON line each, for people to read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_tropd.reporting.records import write_atomic
from megatron_tropd.types import Rollout

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMark:
    """A piece of written text and whether the objective trusted it."""

    text: str
    trusted: bool | None = None
    """None where the gate was not evaluated, or where the objective has no gate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSample:
    """One rollout as text."""

    uid: int
    sample_index: int
    prompt: str
    guidance: str
    response: str
    """What the student wrote, without the guidance."""
    finish: str
    correct: bool | None = None
    tokens: tuple[TokenMark, ...] | None = None
    """The pieces of ``response``."""


def sample_of(
    rollout: Rollout, decode: Decode, *, trusted: Sequence[bool] | None = None, correct: bool | None = None
) -> RolloutSample:
    """A rollout as text; ``trusted`` has one entry for each token that the student wrote."""
    start = rollout.prompt_len + rollout.guidance_len
    written = rollout.token_ids[start:]
    if trusted is not None and len(trusted) != len(written):
        raise ValueError(
            f"rollout of prompt {rollout.prompt_uid}: {len(trusted)} trusted flags for {len(written)} tokens"
        )
    return RolloutSample(
        uid=rollout.prompt_uid,
        sample_index=rollout.sample_index,
        prompt=decode(rollout.token_ids[: rollout.prompt_len]),
        guidance=decode(rollout.token_ids[rollout.prompt_len : start]) if rollout.guidance_len else "",
        response=decode(written) if written else "",
        finish=rollout.finish,
        correct=correct,
        tokens=None if trusted is None else mark_tokens(written, trusted, decode),
    )


def mark_tokens(token_ids: Sequence[int], trusted: Sequence[bool], decode: Decode) -> tuple[TokenMark, ...]:
    """The text of each token with its flag.

    A token can be part of a character (byte-level BPE), and its text can depend on the token before it
    (SentencePiece spaces).  So each piece is the text that it adds to a short window, and tokens that end
    inside a character are joined with the next; a joined piece is trusted if all its tokens are.
    """
    marks: list[TokenMark] = []
    window = start = 0
    for end in range(1, len(token_ids) + 1):
        before, after = decode(token_ids[window:start]), decode(token_ids[window:end])
        if after.endswith("\ufffd") and end < len(token_ids):
            continue
        marks.append(TokenMark(text=after[len(before) :], trusted=all(trusted[start:end])))
        window, start = start, end
    return tuple(marks)


def write_samples(path: Path, samples: Sequence[RolloutSample]) -> None:
    """Write one line for each sample, atomically."""
    write_atomic(path, "".join(f"{json.dumps(asdict(sample))}\n" for sample in samples))


def read_samples(path: Path) -> list[RolloutSample]:
    """The samples of a file that :func:`write_samples` wrote."""
    return [_sample(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _sample(line: str) -> RolloutSample:
    fields = json.loads(line)
    if fields.get("tokens") is not None:
        fields["tokens"] = tuple(TokenMark(**mark) for mark in fields["tokens"])
    return RolloutSample(**fields)
