"""Rows of NeMo Gym, as Nemotron's data sets for reinforcement learning have them.

``{responses_create_params: {input, tools, ...}, ...}``, and beside it or in ``verifier_metadata`` what is verified:
``expected_answer``; ``options`` and ``expected_answer``; ``instruction_id_list`` and ``kwargs``; or ``unit_tests``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_tropd.data.encoding.fields import plain_value
from megatron_tropd.data.reading.rows import Row
from tools.prompt_preparation.drafts import Draft, LeftOut, Reference
from tools.prompt_preparation.layouts.conversations import (
    as_object,
    draft_of,
    refuse_tools,
    required,
    text_or_none,
    turns_of,
)
from tools.prompt_preparation.layouts.layout import Layout, sets
from tools.prompt_preparation.layouts.references import choice_of, constraints_of, reference_of
from tools.prompt_preparation.settings import Settings

_DOMAINS = {"math": "math", "code": "code", "choice": "science", "instructions": "instructions"}
"""Domain of a row that has none, by its grader."""
_VERIFIED = (
    "instruction_id_list", "kwargs", "unit_tests", "options", "expected_answer", "ground_truth", "answer", "question"
)  # fmt: skip
_DOMAIN_KEYS = ("domain", "category")


def _read(row: Row, settings: Settings) -> Draft:
    params = as_object(required(row, "responses_create_params"), "responses_create_params")
    refuse_tools(params.get("tools"))
    turns = [_message(turn) for turn in turns_of(params.get("input"))]
    if system := text_or_none(params.get("instructions"), "instructions"):
        turns.insert(0, {"role": "system", "content": system})
    draft = draft_of(turns, with_response=settings.responses, keep_system=settings.system_messages == "keep")
    metadata = as_object(row.value.get("verifier_metadata"), "verifier_metadata")
    fields = {key: row.value.get(key) if metadata.get(key) is None else metadata[key] for key in _VERIFIED}
    reference = _reference(fields)
    named = next((row.value[key] for key in _DOMAIN_KEYS if row.value.get(key) is not None), None)
    domain = plain_value(named, "domain", "") or _DOMAINS.get(reference.grader or "", "")
    uid = next((row.value[key] for key in ("uuid", "id") if row.value.get(key) is not None), None)
    return replace(draft, domain=domain, reference=reference, uid=text_or_none(uid, "uuid"))


def _message(item: dict[str, Any]) -> dict[str, Any]:
    """Return one item of a request as a message; its parts are called ``input_text`` there.

    Raises:
        LeftOut: it is a tool's call or answer.
    """
    kind = item.get("type")
    if kind not in (None, "message"):
        raise LeftOut("tools", f"an item of the type {kind}")
    content = item.get("content")
    if isinstance(content, list):
        content = [_part(part) for part in content]
    role = "system" if item.get("role") == "developer" else item.get("role")
    return {"role": role, "content": content}


def _part(part: object) -> object:
    if isinstance(part, dict) and part.get("type") in ("input_text", "output_text"):
        return {"type": "text", "text": part.get("text")}
    return part


def _reference(fields: dict[str, Any]) -> Reference:
    """Return the reference of a row, by what its verifier reads."""
    if fields["instruction_id_list"]:
        return constraints_of(fields["instruction_id_list"], fields["kwargs"])
    if fields["unit_tests"]:
        return reference_of(fields["unit_tests"], "unit_tests", "code")
    keys = ("expected_answer", "ground_truth", "answer")
    answer = next((fields[key] for key in keys if fields[key] is not None), None)
    if fields["options"] and answer is not None:
        return choice_of(fields["options"], answer)
    # The verifier of mathematics is the one that reads a question beside the answer.
    return reference_of(answer, "expected_answer", "math" if fields["question"] else None)


NEMOTRON_RL = Layout(
    name="nemotron-rl", needs=sets("responses_create_params"), marks=sets("responses_create_params"),
    columns=frozenset({"responses_create_params", "verifier_metadata", "uuid", "id", *_VERIFIED, *_DOMAIN_KEYS}),
    read=_read,
)  # fmt: skip
