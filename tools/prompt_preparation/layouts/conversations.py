"""Messages and plain values, as every form of data has them."""

from __future__ import annotations

import json
from typing import Any

from megatron_tropd.data.encoding.conversation import read_conversation
from megatron_tropd.data.encoding.fields import MISSING, check_text, lookup, plain_value
from megatron_tropd.data.encoding.row_format import Fault
from megatron_tropd.data.reading.rows import Row, show
from tools.prompt_preparation.drafts import Draft, LeftOut, Message, Reference


def required(row: Row, key: str, flag: str = "") -> object:
    """Return the value of a column that every row has.

    Raises:
        Fault: the row does not have it.
    """
    value = lookup(row, key)
    if value is MISSING:
        keys = ", ".join(show(name, 30) for name in row.keys[:20]) or "none"
        raise Fault(f"no key {show(key)} (keys: {keys})", "a value under that key", flag)
    return value


def parsed(value: object) -> object:
    """Return the list or object that a JSON text is; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def as_object(value: object, what: str) -> dict[str, Any]:
    """Return an object, or the one that a JSON text is; {} for null.

    Raises:
        Fault: it is something else.
    """
    value = {} if value is None else parsed(value)
    if not isinstance(value, dict):
        raise Fault(f"{what} is a {type(value).__name__}: {show(value)}", "an object, or a JSON text of one")
    return value


def text_or_none(value: object, what: str) -> str | None:
    """Return a string or a number as text; None for null and for a blank text."""
    text = plain_value(value, what, "")
    return text if text is not None and text.strip() else None


def draft_of(prompt: object, *, with_response: bool, keep_system: bool = True) -> Draft:
    """Return the prompt, and the assistant's last turn as its response where it is wanted.

    Raises:
        Fault: these are no messages that can be used.
        LeftOut: they use tools.
    """
    conversation = read_conversation(prompt)
    for message in conversation.messages:
        if message["role"] == "tool" or message.get("tool_calls"):
            raise LeftOut("tools", f"a message of the role {show(message['role'], 30)}")
    messages = tuple(_plain(message) for message in conversation.messages)
    if not keep_system:
        messages = tuple(message for message in messages if message["role"] != "system")
    if not any(message["role"] == "user" for message in messages):
        raise Fault("a conversation without a message by the user", "one to answer")
    return Draft(messages=messages, response=conversation.reply if with_response else None)


def _plain(message: dict[str, Any]) -> Message:
    return {"role": message["role"], "content": message["content"]}


def turns_of(value: object) -> list[Any]:
    """Return the turns of a conversation: of a list, of a JSON text of one, or the one turn of a text by the user.

    Raises:
        Fault: it is something else.
    """
    found = parsed(value)
    if isinstance(found, list) and found and all(isinstance(turn, dict) for turn in found):
        return found
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    raise Fault(f"the conversation is {show(value)}", "a text or a list of messages")


def refuse_tools(tools: object) -> None:
    """Raise LeftOut if a row describes tools."""
    if parsed(tools) not in (None, "", [], {}):
        raise LeftOut("tools", "the row describes tools")


def response_of(value: object) -> str:
    """Return a column with the teacher's response.

    Raises:
        Fault: it is no text.
    """
    return check_text(value, "the response", "")


def reference_or_none(value: object, what: str, grader: str | None) -> Reference:
    """Return a plain answer, graded by ``grader``."""
    answer = text_or_none(value, what)
    return Reference(answer=answer, grader=grader if answer is not None else None)
