"""Rows of Nemotron for supervised finetuning, in two forms.

``{messages, category, reasoning, uuid, ...}`` (Nemotron-Post-Training-Dataset-v1 and -v2), and ``{input, output,
category, reasoning, used_in_training, system_prompt, ...}`` (Llama-Nemotron-Post-Training-Dataset) with a text or a
list of messages as the input.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_tropd.data.encoding.fields import plain_value
from megatron_tropd.data.encoding.row_format import Fault
from megatron_tropd.data.reading.rows import Row
from tools.prompt_preparation.drafts import Draft, LeftOut
from tools.prompt_preparation.layouts.conversations import (
    draft_of,
    refuse_tools,
    required,
    response_of,
    text_or_none,
    turns_of,
)
from tools.prompt_preparation.layouts.layout import Layout, sets
from tools.prompt_preparation.layouts.references import reference_of
from tools.prompt_preparation.settings import Settings


def _read(row: Row, settings: Settings) -> Draft:
    refuse_tools(row.value.get("tools"))
    system = text_or_none(row.value.get("system_prompt"), "system_prompt")
    keep_system = settings.system_messages == "keep"
    pairs = row.value.get("messages") is None
    turns = _with_system(turns_of(required(row, "input" if pairs else "messages")), system)
    if turns[-1].get("tool_calls"):
        raise LeftOut("tools", "the reply calls tools")
    if settings.responses and turns[-1].get("reasoning_content"):  # the chat template says how the two are joined
        raise Fault("a reply with reasoning_content", "a reply whose content holds its thinking", "--responses")
    draft = draft_of(turns, with_response=settings.responses and not pairs, keep_system=keep_system)
    category = plain_value(row.value.get("category"), "category", "") or ""
    expected = row.value.get("expected_answer")
    return replace(
        draft, domain=category,
        response=response_of(row.value.get("output")) if settings.responses and pairs else draft.response,
        uid=text_or_none(row.value.get("uuid"), "uuid"),
        reference=reference_of(expected, "expected_answer", "math" if category == "math" else None),
    )  # fmt: skip


def _with_system(turns: list[Any], system: str | None) -> list[Any]:
    """Return the turns with the row's system prompt in front, unless they begin with one."""
    if system is None or turns[0].get("role") == "system":
        return turns
    return [{"role": "system", "content": system}, *turns]


NEMOTRON_SFT = Layout(
    name="nemotron-sft", needs=sets("messages", "input output"),
    marks=sets("messages category", "input output category"),
    columns=frozenset(
        {"messages", "input", "output", "category", "system_prompt", "uuid", "tools", "expected_answer"}
    ), read=_read,
)  # fmt: skip
