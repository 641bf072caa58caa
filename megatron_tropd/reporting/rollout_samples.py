"""A few rollouts of a step as text, with what the loss read at each token; one JSON line each, for people to read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_tropd.atomic_files import write_text
from megatron_tropd.reports import TokenNumbers
from megatron_tropd.types import Rollout

TOKENS_KEPT = 8192
"""Response tokens of a rollout whose numbers are written, 60 to 160 bytes each; the text is whole."""
_BYTES_OF_CHARACTER = 4
"""The most bytes, and so tokens, of a character in UTF-8."""
_DECIMALS = 5

Value = float | str | None
"""A number; "-inf" or "inf", which JSON does not have; None where there is no such number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenText:
    """How token ids become text."""

    decode: Callable[[Sequence[int]], str]
    """Ids to text without special tokens."""
    name: Callable[[int], str]
    """A single id to text; a special token to its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleTokens:
    """The tokens of a response by column, each with one entry per token: at most the first ``TOKENS_KEPT``."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    """What each adds to the text; "" for a special token, and for one that ends inside a character."""
    region: tuple[str, ...]
    """``guidance``, ``guidance_copy`` (in no loss) or ``on_policy``."""
    student_logprob: tuple[Value, ...]
    teacher_logprob: tuple[Value, ...]
    reward: tuple[Value, ...]
    trust: tuple[Value, ...]
    coin: tuple[Value, ...]
    teacher_entropy: tuple[Value, ...]
    teacher_top: tuple[tuple[tuple[int, float], ...], ...]
    """(id, log-probability) of the teacher's most probable tokens; () where they were not sent."""
    names: dict[str, str]
    """Text of every id that is named above."""


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
    num_tokens: int = 0
    """Tokens of the response, guidance included."""
    correct: bool | None = None
    name: str = ""
    """The text by which the data names the prompt; "" if it has none."""
    tokens: SampleTokens | None = None
    """Of guidance and response; None where the numbers are not known."""

    @property
    def trusted_share(self) -> float | None:
        """Mean weight that the gate gave to the written tokens in ``tokens``; None without a gate."""
        weights = [weight for weight in (self.tokens.trust if self.tokens else ()) if isinstance(weight, float | int)]
        return sum(weights) / len(weights) if weights else None


def sample_of(
    rollout: Rollout, text: TokenText, *, numbers: TokenNumbers | None = None, correct: bool | None = None,
    name: str = "",
) -> RolloutSample:  # fmt: skip
    """A rollout as text, with the ``numbers`` of its response tokens; ``name`` is the prompt's in the data.

    Raises:
        ValueError: the numbers are of another number of tokens.
    """
    start, written = rollout.prompt_len, rollout.prompt_len + rollout.guidance_len
    guidance, response = rollout.token_ids[start:written], rollout.token_ids[written:]
    return RolloutSample(
        uid=rollout.prompt_uid,
        sample_index=rollout.sample_index,
        prompt=text.decode(rollout.token_ids[:start]),
        guidance=text.decode(guidance) if guidance else "",
        response=text.decode(response) if response else "",
        finish=rollout.finish,
        num_tokens=rollout.response_len,
        correct=correct,
        name=name,
        tokens=None if numbers is None else _tokens(rollout, text, numbers),
    )


def _tokens(rollout: Rollout, text: TokenText, numbers: TokenNumbers) -> SampleTokens:
    if len(numbers.region) != rollout.response_len:
        raise ValueError(
            f"rollout of prompt {rollout.prompt_uid}: numbers of {len(numbers.region)} tokens for "
            f"{rollout.response_len} response tokens"
        )
    kept = rollout.token_ids[rollout.prompt_len :][:TOKENS_KEPT]
    guidance, written = kept[: rollout.guidance_len], kept[rollout.guidance_len :]
    top = tuple(
        tuple((token, round(logprob, _DECIMALS)) for token, logprob in of_token)
        for of_token in numbers.teacher_top[:TOKENS_KEPT]
    )
    named = {*kept, *(token for of_token in top for token, _ in of_token)}
    return SampleTokens(
        ids=kept,
        texts=(*token_texts(guidance, text.decode), *token_texts(written, text.decode)),
        region=numbers.region[:TOKENS_KEPT],
        student_logprob=_values(numbers.student_logprob),
        teacher_logprob=_values(numbers.teacher_logprob),
        reward=_values(numbers.reward),
        trust=_values(numbers.trust),
        coin=_values(numbers.coin),
        teacher_entropy=_values(numbers.teacher_entropy),
        teacher_top=top,
        names={str(token): text.name(token) for token in sorted(named)},
    )


def _values(column: Iterable[float | None]) -> tuple[Value, ...]:
    return tuple(_value(number) for number in list(column)[:TOKENS_KEPT])


def _value(number: float | None) -> Value:
    if number is None:
        return None
    return round(number, _DECIMALS) if math.isfinite(number) else str(number)


def token_texts(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text that each token adds to the tokens before it.

    A token can be part of a character (byte-level BPE), and its text can depend on the token before it (SentencePiece
    spaces).  Of the tokens of one character only the last has a text.  A special token has none.
    """
    texts: list[str] = []
    before: list[int] = []
    piece: list[int] = []
    for end, token in enumerate(token_ids, start=1):
        piece.append(token)
        text = decode([*before, *piece])
        if text.endswith("\ufffd") and len(piece) < _BYTES_OF_CHARACTER and end < len(token_ids):
            texts.append("")
            continue
        text = text[len(decode(before)) :]
        texts.append(text)
        before, piece = piece if text else before, []
    return texts


def write_samples(path: Path, samples: Sequence[RolloutSample]) -> None:
    """Write one line for each sample, atomically."""
    write_text(path, "".join(f"{json.dumps(asdict(sample), allow_nan=False)}\n" for sample in samples))


def read_samples(path: Path) -> list[RolloutSample]:
    """The samples of a file that :func:`write_samples` wrote."""
    return [_sample(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _sample(line: str) -> RolloutSample:
    fields = json.loads(line)
    tokens = fields.get("tokens")
    # Runs of earlier versions wrote pieces of text with marks there; their text is shown without numbers.
    fields["tokens"] = _sample_tokens(tokens) if isinstance(tokens, dict) else None
    return RolloutSample(**fields)


def _sample_tokens(columns: dict[str, Any]) -> SampleTokens:
    top = tuple(tuple((token, logprob) for token, logprob in of_token) for of_token in columns.pop("teacher_top"))
    names = columns.pop("names")
    return SampleTokens(**{name: tuple(column) for name, column in columns.items()}, teacher_top=top, names=names)
