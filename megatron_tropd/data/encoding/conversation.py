"""Chat messages in the shapes that data sets have them, as the list of {role, content} that templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tropd.data.encoding.fields import check_characters, check_text
from megatron_tropd.data.encoding.row_format import Fault
from megatron_tropd.data.reading.rows import kind_of, show

_FLAG = "--prompt-key"
_EXPECTED = "a string or a list of {role, content} (or {from, value})"
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
"""Names of speakers in {from, value} messages, and the roles that they are."""
_SHAPES = ({"role", "content"}, {"from", "value"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The messages of a prompt, and the reply that the data has after them."""

    messages: tuple[dict[str, Any], ...]
    reply: str | None = None
    """Content of a last message by the assistant; None where the conversation ends with another."""


def read_conversation(prompt: object) -> Conversation:
    """Return the conversation of a row whose prompt is a text or a list of messages.

    Raises:
        Fault: it is something else, or a message cannot be used.
    """
    if isinstance(prompt, str):
        prompt = _messages_in_text(prompt)
    if isinstance(prompt, str):
        return Conversation(messages=({"role": "user", "content": check_text(prompt, "prompt", _FLAG)},))
    if isinstance(prompt, dict):
        prompt = _by_message(prompt)
    if not isinstance(prompt, list) or not prompt:
        found = "an empty list" if prompt == [] else kind_of(prompt)
        raise Fault(f"prompt is {found}", _EXPECTED, _FLAG)
    messages = [_message(number, message) for number, message in enumerate(prompt)]
    last = messages[-1]
    if last["role"] != "assistant":
        return Conversation(messages=tuple(messages))
    if len(messages) == 1:
        raise Fault("the only message is the assistant's", "a message before the reply", _FLAG)
    if last.get("tool_calls"):
        raise Fault("the reply at the end calls tools", "a reply that is text", _FLAG)
    return Conversation(messages=tuple(messages[:-1]), reply=last["content"])


def _messages_in_text(text: str) -> object:
    """Return the messages of a text that is a JSON list of messages, as some data sets store them; else the text."""
    if text.lstrip()[:1] != "[":
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(value, list) or not value:
        return text
    are_messages = all(isinstance(item, dict) and any(keys <= set(item) for keys in _SHAPES) for item in value)
    return value if are_messages else text


def _by_message(columns: Mapping[str, Any]) -> object:
    """Return a list of messages from a mapping of lists, which is how Arrow files of ``datasets`` may hold them."""
    lists = {key: value for key, value in columns.items() if isinstance(value, list)}
    if not any(keys <= set(lists) for keys in _SHAPES):
        return columns
    sizes = {key: len(value) for key, value in lists.items()}
    if len(set(sizes.values())) != 1:
        raise Fault(f"prompt has lists of different lengths: {show(sizes)}", _EXPECTED, _FLAG)
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _message(number: int, message: object) -> dict[str, Any]:
    """Return one message with ``role`` and ``content``, and what else it has that templates may read."""
    if not isinstance(message, dict):
        raise Fault(f"message {number} is {kind_of(message)}", _EXPECTED, _FLAG)
    # In Parquet every message has the keys of all messages; absent values are null.
    given = {key: value for key, value in message.items() if value is not None}
    if "from" in given or "value" in given:
        given = _by_role(number, given)
    role = check_text(given.get("role"), f"role of message {number}", _FLAG)
    content = _content(given.get("content"), f"content of message {number}", role, calls=bool(given.get("tool_calls")))
    return {**given, "role": role, "content": content}


def _by_role(number: int, given: dict[str, Any]) -> dict[str, Any]:
    """Return a {from, value} message as {role, content}."""
    if not {"from", "value"} <= set(given) or {"role", "content"} & set(given):
        raise Fault(f"message {number} has the keys {show(sorted(given))}", _EXPECTED, _FLAG)
    rest = dict(given)
    speaker = check_text(rest.pop("from"), f"from of message {number}", _FLAG)
    role = _ROLES.get(speaker.lower())
    if role is None:
        raise Fault(f"message {number} is from {show(speaker)}", f"one of {', '.join(sorted(_ROLES))}", _FLAG)
    return {"role": role, "content": rest.pop("value"), **rest}


def _content(content: object, what: str, role: str, *, calls: bool) -> str:
    """Return the text of a message.  A system message may be empty, and one that calls tools may have no text."""
    if content is None and calls:
        return ""
    if isinstance(content, list):
        content = _joined(content, what)
    if isinstance(content, str) and not content.strip() and (role == "system" or calls):
        check_characters(content, what, _FLAG)
        return content
    return check_text(content, what, _FLAG)


def _joined(parts: list[Any], what: str) -> str:
    """Return the text of a content that is a list of parts; parts that are not text cannot be read here."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or kind != "text" or not isinstance(part.get("text"), str):
            raise Fault(f"{what} has a part of type {show(kind)}", "text, or parts of type 'text' only", _FLAG)
        texts.append(part["text"])
    return "".join(texts)
