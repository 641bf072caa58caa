"""A few rollouts of a step as text, one JSON line each, for people to read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_tropd.reporting.records import write_atomic
from megatron_tropd.types import Rollout

Decode = Callable[[Sequence[int]], str]
_BYTES_OF_CHARACTER = 4
"""The most bytes, and so tokens, of a character in UTF-8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenMark:
    """A piece of written text and whether the objective's gate trusted it."""

    text: str
    trusted: bool


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
    name: str = ""
    """The text by which the data names the prompt; "" if it has none."""
    tokens: tuple[TokenMark, ...] | None = None
    """The pieces of ``response``; None for a method without a gate."""


def sample_of(
    rollout: Rollout,
    decode: Decode,
    *,
    trust: Sequence[float] | None = None,
    correct: bool | None = None,
    name: str = "",
) -> RolloutSample:
    """A rollout as text; ``trust`` is the gate's weight, in [0, 1], of each token that the student wrote.  The gate
    rejects a token of a weight below 1/2; a coin or a threshold gives 0 or 1.  ``name`` is the prompt's in the data."""
    start = rollout.prompt_len + rollout.guidance_len
    written = rollout.token_ids[start:]
    if trust is not None and len(trust) != len(written):
        raise ValueError(f"rollout of prompt {rollout.prompt_uid}: {len(trust)} weights for {len(written)} tokens")
    return RolloutSample(
        uid=rollout.prompt_uid,
        sample_index=rollout.sample_index,
        prompt=decode(rollout.token_ids[: rollout.prompt_len]),
        guidance=decode(rollout.token_ids[rollout.prompt_len : start]) if rollout.guidance_len else "",
        response=decode(written) if written else "",
        finish=rollout.finish,
        correct=correct,
        name=name,
        tokens=None if trust is None else mark_tokens(written, [weight >= 0.5 for weight in trust], decode),
    )


def mark_tokens(token_ids: Sequence[int], trusted: Sequence[bool], decode: Decode) -> tuple[TokenMark, ...]:
    """The text of each token with its flag.

    A token can be part of a character (byte-level BPE), and its text can depend on the token before it (SentencePiece
    spaces).  So each piece is the text that it adds to the piece before it, and tokens that end inside a character are
    joined with the next; a joined piece is trusted if all its tokens are.  A special token has no text.
    """
    marks: list[TokenMark] = []
    before: list[int] = []
    piece: list[int] = []
    for end, token in enumerate(token_ids, start=1):
        piece.append(token)
        text = decode([*before, *piece])
        if text.endswith("\ufffd") and len(piece) < _BYTES_OF_CHARACTER and end < len(token_ids):
            continue
        text = text[len(decode(before)) :]
        marks.append(TokenMark(text=text, trusted=all(trusted[end - len(piece) : end])))
        before, piece = piece if text else before, []
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
