"""Turns one record of a prompt file into a tokenized Prompt, or a Fault whose message says what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import jinja2

from megatron_tropd.data.rows import Row, show
from megatron_tropd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_UID = 1 << 43
"""Uids are below this: rng.sample_uid shifts a uid left by 20 bits and the result must fit an int64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFormat:
    """How the rows of the prompt files are read."""

    prompt_key: str = "prompt"
    response_key: str = "response"
    answer_key: str = "answer"
    domain_key: str = "domain"
    chat_template: bool = False
    """Whether prompts are wrapped in the tokenizer's chat template (--apply-chat-template); else they are raw text."""
    max_prompt_length: int
    """In tokens; a longer prompt is a bad row."""
    max_response_length: int
    """In tokens, without the stop token; a longer teacher response is a bad row."""
    on_bad_row: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if self.max_prompt_length < 1 or self.max_response_length < 1:
            raise ValueError(
                f"--max-prompt-length {self.max_prompt_length} and --max-response-length "
                f"{self.max_response_length} must both be at least 1"
            )
        if self.on_bad_row not in ("error", "skip"):
            raise ValueError(f"--on-bad-row {self.on_bad_row!r}: expected error or skip")

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys read from a row."""
        return tuple(dict.fromkeys((self.prompt_key, self.response_key, self.answer_key, self.domain_key, "uid")))


class Fault(Exception):
    """The reason why a row cannot be used; reported as a BadRow with the row's place."""

    def __init__(self, found: str, expected: str, flag: str = "") -> None:
        super().__init__(found)
        self.found, self.expected, self.flag = found, expected, flag


def encode_row(
    row: Row, tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat, stop_ids: Sequence[int], running_uid: int
) -> Prompt:
    """Return the prompt of one row.

    Args:
        row: the record.
        tokenizer: of the student and the teacher (teacher/preflight.py checks that they are equal).
        fmt: keys, limits and mode.
        stop_ids: ids that end a teacher response; the first is appended to a response that does not end in one.
        running_uid: uid of a row without an integer ``uid`` of its own.

    Raises:
        Fault: the row cannot be used.
    """
    uid = row.value.get("uid")
    if not isinstance(uid, int) or isinstance(uid, bool):
        uid = running_uid
    if not 0 <= uid < _MAX_UID:
        raise Fault(f"uid {show(uid)}", f"an integer in [0, {_MAX_UID})")
    if fmt.prompt_key not in row.keys:
        keys = ", ".join(show(key, 30) for key in row.keys[:20]) or "none"
        raise Fault(f"no key {show(fmt.prompt_key)} (keys: {keys})", "a prompt under that key", "--prompt-key")
    prompt = row.value[fmt.prompt_key]
    token_ids = _encode_chat(prompt, tokenizer) if fmt.chat_template else _encode_raw(prompt, tokenizer)
    if len(token_ids) > fmt.max_prompt_length:
        limit = f"at most --max-prompt-length {fmt.max_prompt_length}"
        raise Fault(f"a prompt of {len(token_ids)} tokens", limit, "--max-prompt-length")
    return Prompt(
        uid=uid,
        token_ids=token_ids,
        teacher_response_ids=_encode_response(row.value.get(fmt.response_key), tokenizer, fmt, stop_ids),
        answer=_plain_value(row.value.get(fmt.answer_key), "answer", "--answer-key"),
        domain=_plain_value(row.value.get(fmt.domain_key), "domain", "--domain-key") or "",
    )


def _check_characters(text: str, what: str, flag: str) -> None:
    if (at := text.find("\0")) >= 0:
        raise Fault(f"{what} with a NUL character at index {at}", "text without NUL", flag)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Fault(f"{what} with a lone surrogate at index {error.start}", "valid Unicode text", flag) from None


def _check_text(text: object, what: str, flag: str, expected: str = "a string") -> str:
    """Return ``text``; raise Fault unless it is a non-blank string without NUL characters or lone surrogates."""
    if not isinstance(text, str):
        raise Fault(f"{what} is a {type(text).__name__}: {show(text)}", expected, flag)
    if not text.strip():
        raise Fault(f"{what} is {'only whitespace' if text else 'empty'}", "text", flag)
    _check_characters(text, what, flag)
    return text


def _encode_raw(prompt: object, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    if isinstance(prompt, list):
        raise Fault("prompt is a list (chat messages?)", "a string, or --apply-chat-template", "--apply-chat-template")
    text = _check_text(prompt, "prompt", "--prompt-key")
    return _token_ids(tokenizer.encode(text, add_special_tokens=False), "prompt", "--prompt-key")


def _encode_chat(prompt: object, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    messages = _check_messages(prompt)
    try:
        encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        # Templates reject conversations (order of roles, unknown roles) by raising errors inside Jinja.
        raise Fault(
            f"the chat template refuses the prompt ({show(str(error), 200)})",
            "a conversation the template accepts",
            "--apply-chat-template",
        ) from error
    # transformers 4 returns a list, transformers 5 a BatchEncoding.
    ids = encoded["input_ids"] if isinstance(encoded, Mapping) else encoded
    return _token_ids(ids, "prompt", "--prompt-key")


def _check_messages(prompt: object) -> list[dict[str, Any]]:
    expected = "a string or a list of {role, content}"
    if isinstance(prompt, str):
        return [{"role": "user", "content": _check_text(prompt, "prompt", "--prompt-key")}]
    if not isinstance(prompt, list) or not prompt:
        found = "an empty list" if prompt == [] else f"a {type(prompt).__name__}: {show(prompt)}"
        raise Fault(f"prompt is {found}", expected, "--prompt-key")
    messages = []
    for number, message in enumerate(prompt):
        if not isinstance(message, dict):
            raise Fault(f"message {number} is a {type(message).__name__}: {show(message)}", expected, "--prompt-key")
        for key in ("role", "content"):
            _check_text(message.get(key), f"{key} of message {number}", "--prompt-key")
        # In Parquet every message has the keys of all messages; absent values are null.
        messages.append({key: value for key, value in message.items() if value is not None})
    if messages[-1]["role"] == "assistant":
        raise Fault("the last message is the assistant's", "a prompt that ends before the reply", "--prompt-key")
    return messages


def _encode_response(
    response: object, tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat, stop_ids: Sequence[int]
) -> tuple[int, ...] | None:
    """Return the tokens of the teacher's response, with one stop token, at the end; None if there is no response."""
    if response is None:
        return None
    text = _check_text(response, "response", "--response-key", "a string or null")
    ids = _token_ids(tokenizer.encode(text, add_special_tokens=False), "response", "--response-key")
    body = ids[:-1] if ids[-1] in stop_ids else ids
    if len(body) > fmt.max_response_length:
        limit = f"at most --max-response-length {fmt.max_response_length} and a stop token"
        raise Fault(f"a teacher response of {len(body)} tokens", limit, "--max-response-length")
    for at, token in enumerate(body):
        if token in stop_ids:  # a student given more than this would write after the end
            found = f"a teacher response with stop token {token} at token {at} of {len(ids)}"
            raise Fault(found, "a stop token at the end only", "--response-key")
    return ids if len(body) < len(ids) else (*ids, stop_ids[0])


def _plain_value(value: object, what: str, flag: str) -> str | None:
    """Return a string, or a number as a string; None if the value is missing."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Fault(f"{what} is a {type(value).__name__}: {show(value)}", "a string, a number or null", flag)
    text = str(value)
    _check_characters(text, what, flag)
    return text


def _token_ids(ids: Sequence[int], what: str, flag: str) -> tuple[int, ...]:
    if not ids:
        raise Fault(f"{what} encodes to no tokens", "text the tokenizer knows", flag)
    return tuple(int(token) for token in ids)
