"""Lengths of prompts and responses: in tokens as a run counts them, or in characters without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_tropd.data.encoding.row_format import Fault, PromptFormat
from megatron_tropd.data.encoding.texts import RowTexts, texts_of
from megatron_tropd.data.reading.rows import Row
from megatron_tropd.data.tokenizer import load_tokenizer
from megatron_tropd.hub import MODEL_CONFIG_FILES, resolve
from tools.prompt_preparation.settings import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Lengths of a row; those of the response without a stop token at its end."""

    prompt: int
    response: int | None


class Measure:
    """Measures rows as they are written."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self.unit = "characters" if tokenizer is None else "tokens"

    def check_form(self, form: str) -> None:
        """Raise UsageError if prompts of this form ("messages" or "text") cannot be measured."""
        if form == "messages" and self._tokenizer is not None and not self._tokenizer.chat_template:
            raise UsageError(
                f"--tokenizer {self._tokenizer.name_or_path}: has no chat template, and the prompts are messages; "
                "give a chat model's tokenizer, or --prompt-form text"
            )

    def sizes(self, rows: Sequence[Row]) -> list[Sizes | Fault]:
        """Return the lengths of rows with ``prompt`` and ``response``, or why a run would refuse one."""
        if self._tokenizer is None:
            return [_characters(row) for row in rows]
        texts = [self._texts(row) for row in rows]
        good = [text for text in texts if isinstance(text, RowTexts)]
        prompts = iter(self._tokenize([text.prompt for text in good]))
        responses = iter(self._tokenize([text.response for text in good if text.response is not None]))
        return [
            text
            if isinstance(text, Fault)
            else Sizes(
                prompt=len(next(prompts)),
                response=None if text.response is None else self._without_stop(next(responses)),
            )
            for text in texts
        ]

    def _texts(self, row: Row) -> RowTexts | Fault:
        assert self._tokenizer is not None
        # The limits are the caller's: a length beyond them is no fault here.
        is_chat = not isinstance(row.value["prompt"], str)
        fmt = PromptFormat(chat_template=is_chat, max_prompt_length=1, max_response_length=1)
        try:
            return texts_of(row, self._tokenizer, fmt)
        except Fault as fault:
            return fault

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        tokenizer: Any = self._tokenizer
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return encoded["input_ids"]  # type: ignore[no-any-return]

    def _without_stop(self, ids: list[int]) -> int:
        assert self._tokenizer is not None
        return len(ids) - bool(ids and ids[-1] == self._tokenizer.eos_token_id)


def _characters(row: Row) -> Sizes:
    prompt: Any = row.value["prompt"]
    response: Any = row.value["response"]
    size = len(prompt) if isinstance(prompt, str) else sum(len(message["content"]) for message in prompt)
    return Sizes(prompt=size, response=None if response is None else len(response))


def load_measure(tokenizer: str | None) -> Measure:
    """Return what measures rows; ``tokenizer`` is a directory or a model of the Hub.

    Raises:
        UsageError: there is no tokenizer that can be read.
    """
    if tokenizer is None:
        return Measure(None)
    try:
        resolved = resolve(tokenizer, repo_type="model", allow_patterns=MODEL_CONFIG_FILES, flag="--tokenizer")
        return Measure(load_tokenizer(resolved.path))
    except (OSError, ValueError) as error:
        text = str(error)
        raise UsageError(text if text.startswith("--tokenizer") else f"--tokenizer {tokenizer}: {text}") from error
