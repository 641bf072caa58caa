"""Tokens of many rows at one time: fast tokenizers encode a batch with all cores of the machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from megatron_tropd.data.encoding.row_format import Fault, PromptFormat
from megatron_tropd.data.encoding.texts import RowTexts, texts_of
from megatron_tropd.data.reading.rows import BadRow, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


T = TypeVar("T")


class _TooLong(Fault):
    """The response is longer than --max-response-length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRow:
    """One row as token ids."""

    line: int
    """Line or row number of its place."""
    uid: int | str | None
    """As the row gives it."""
    prompt_ids: np.ndarray  # [P] int32
    response_ids: np.ndarray | None  # [R] int32
    """The teacher's response, with a stop token at its end unless it was cut; None if there is none."""
    response_len: int
    """Tokens of the whole response with its stop token; more than R where it was cut."""
    answer: str | None
    grader: str
    domain: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """What turns rows into tokens."""

    tokenizer: PreTrainedTokenizerBase
    """Of the student and the teacher (teacher/preflight.py checks that they are equal)."""
    fmt: PromptFormat
    stop_ids: tuple[int, ...]
    """Ids that end a teacher response; the first is appended to a response that does not end in one."""

    def fingerprint(self) -> str:
        """Return a hash of everything that decides which tokens a row becomes."""
        import tokenizers
        import transformers

        tokenizer: Any = self.tokenizer
        state = hashlib.sha256(repr((transformers.__version__, tokenizers.__version__, self.stop_ids)).encode())
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
        parts = type(tokenizer).__name__, vocabulary, repr(tokenizer.special_tokens_map), repr(tokenizer.chat_template)
        fmt = self.fmt
        limits = fmt.chat_template, fmt.max_prompt_length, fmt.max_response_length, fmt.on_long_response
        for part in (*parts, repr(fmt.keys), repr(limits)):
            state.update(hashlib.sha256(part.encode("utf-8", errors="surrogatepass")).digest())
        return state.hexdigest()

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow | BadRow | None]:
        """Return each row as tokens, or as the report of why it cannot be used; None for one that is left out because
        of ``on_long_response``."""
        texts = [self._attempt(row, partial(texts_of, row, self.tokenizer, self.fmt)) for row in rows]
        good = [text for text in texts if isinstance(text, RowTexts)]
        prompts = iter(self._tokenize([text.prompt for text in good]))
        responses = iter(self._tokenize([text.response for text in good if text.response is not None]))
        result: list[EncodedRow | BadRow | None] = []
        for row, text in zip(rows, texts, strict=True):
            if not isinstance(text, RowTexts):
                result.append(text)
                continue
            prompt = next(prompts)
            response = None if text.response is None else next(responses)
            result.append(self._attempt(row, partial(self._encoded, row, text, prompt, response)))
        return result

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded: Any = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return encoded["input_ids"]  # type: ignore[no-any-return]

    def _encoded(self, row: Row, text: RowTexts, prompt: list[int], response: list[int] | None) -> EncodedRow:
        fmt = self.fmt
        if not prompt:
            raise Fault("prompt encodes to no tokens", "text the tokenizer knows", "--prompt-key")
        if len(prompt) > fmt.max_prompt_length:
            limit = f"at most --max-prompt-length {fmt.max_prompt_length}"
            raise Fault(f"a prompt of {len(prompt)} tokens", limit, "--max-prompt-length")
        ids, length = (None, 0) if response is None else self._response(response)
        return EncodedRow(
            line=row.line, uid=text.uid, prompt_ids=np.asarray(prompt, dtype=np.int32), response_ids=ids,
            response_len=length, answer=text.answer, grader=text.grader, domain=text.domain,
        )  # fmt: skip

    def _response(self, ids: list[int]) -> tuple[np.ndarray, int]:
        """Return the tokens of a response that are kept, and the length of the whole with its stop token."""
        if not ids:
            raise Fault("response encodes to no tokens", "text the tokenizer knows", "--response-key")
        ends = ids[-1] in self.stop_ids
        body = np.asarray(ids[:-1] if ends else ids, dtype=np.int32)
        limit = self.fmt.max_response_length
        if len(body) > limit and self.fmt.on_long_response != "cut":
            raise _TooLong(
                f"a teacher response of {len(body)} tokens",
                f"at most --max-response-length {limit} and a stop token, or --on-long-response cut",
                "--max-response-length",
            )
        kept = body[:limit]
        stops = np.flatnonzero(np.isin(kept, self.stop_ids))
        if len(stops):  # a student given more than this would write after the end
            found = f"a teacher response with stop token {kept[stops[0]]} at token {stops[0]} of {len(ids)}"
            raise Fault(found, "a stop token at the end only", "--response-key")
        if len(body) <= limit:
            kept = np.append(kept, np.int32(ids[-1] if ends else self.stop_ids[0]))
        return kept, len(body) + 1

    def _attempt(self, row: Row, action: Callable[[], T]) -> T | BadRow | None:
        """Return the result of ``action``, or its Fault with the place of the row."""
        try:
            return action()
        except Fault as fault:
            if isinstance(fault, _TooLong) and self.fmt.on_long_response == "skip":
                return None
            return BadRow(path=row.path, line=row.line, found=fault.found, expected=fault.expected, flag=fault.flag)
