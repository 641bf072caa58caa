"""The texts of a row: the prompt as the model reads it, and the teacher's response to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_tropd.data.encoding.conversation import read_conversation
from megatron_tropd.data.encoding.fields import MISSING, check_characters, check_text, lookup, plain_value, read_uid
from megatron_tropd.data.encoding.row_format import Fault, PromptFormat
from megatron_tropd.data.encoding.thinking import check_thinking
from megatron_tropd.data.reading.rows import Row, kind_of, show

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHAT_FLAG = "--apply-chat-template"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTexts:
    """The values of a row before it is tokenized."""

    uid: int | str | None
    prompt: str
    """With the chat template, if there is one."""
    response: str | None
    answer: str | None
    grader: str
    domain: str


def texts_of(row: Row, tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat) -> RowTexts:
    """Return the texts of one row.

    Raises:
        Fault: the row cannot be used.
    """
    uid = read_uid(lookup(row, fmt.uid_key))
    prompt = lookup(row, fmt.prompt_key)
    if prompt is MISSING:
        keys = ", ".join(show(key, 30) for key in row.keys[:20]) or "none"
        raise Fault(f"no key {show(fmt.prompt_key)} (keys: {keys})", "a prompt under that key", "--prompt-key")
    response = lookup(row, fmt.response_key)
    response = None if response is MISSING else response
    if fmt.chat_template:
        conversation = read_conversation(prompt)
        text = _render(conversation.messages, lookup(row, fmt.tools_key), tokenizer)
        if fmt.response_key and conversation.reply is not None:
            if response is not None:
                raise Fault("a response, and messages that end with another", "one of them", "--response-key")
            response = conversation.reply
    else:
        text = _raw(prompt)
    if response is not None:
        response = check_text(response, "response", "--response-key", "a string or null")
        check_thinking(text, response)
    return RowTexts(
        uid=uid,
        prompt=text,
        response=response,
        answer=plain_value(lookup(row, fmt.answer_key), "answer", "--answer-key"),
        grader=plain_value(lookup(row, fmt.grader_key), "grader", "--grader-key") or "",
        domain=plain_value(lookup(row, fmt.domain_key), "domain", "--domain-key") or "",
    )


def _raw(prompt: object) -> str:
    if isinstance(prompt, list | dict):
        kind = "list" if isinstance(prompt, list) else "dict"
        raise Fault(f"prompt is a {kind} (chat messages?)", f"a string, or {_CHAT_FLAG}", _CHAT_FLAG)
    return check_text(prompt, "prompt", "--prompt-key")


def _render(messages: Sequence[dict[str, Any]], tools: object, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the conversation in the tokenizer's chat template, with the generation prompt at its end."""
    template = str(tokenizer.chat_template)
    described = _tools(tools)
    for what, used in (("tools", described), ("tool_calls", any("tool_calls" in message for message in messages))):
        if used and what not in template:
            raise Fault(f"the prompt has {what}", f"a chat template that renders {what}", _CHAT_FLAG)
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=described or None, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:
        # A template is a program: it rejects conversations by raising, and may fail in any other way.
        raise Fault(
            f"the chat template refuses the prompt ({show(str(error), 200)})",
            "a conversation the template accepts",
            _CHAT_FLAG,
        ) from error
    check_characters(str(text), "the rendered prompt", "--prompt-key")
    return str(text)


def _tools(tools: object) -> list[Any]:
    """Return the descriptions of tools; a text is JSON, as some data sets store them."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise Fault(f"tools is {show(tools)}", "a JSON list of tools", "--tools-key") from None
    if tools is MISSING or tools is None or tools == [] or tools == "":
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Fault(f"tools is {kind_of(tools)}", "a list of tools", "--tools-key")
    return tools
