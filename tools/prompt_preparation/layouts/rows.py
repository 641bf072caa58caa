"""The project's own rows, and any data set by the names of its columns (docs/data.md)."""

from __future__ import annotations

from dataclasses import replace

from megatron_tropd.data.encoding.fields import MISSING, Missing, lookup, plain_value
from megatron_tropd.data.encoding.row_format import Fault
from megatron_tropd.data.reading.rows import Row, show
from tools.prompt_preparation.drafts import GRADERS, Draft, Reference
from tools.prompt_preparation.layouts.conversations import draft_of, refuse_tools, required, response_of, text_or_none
from tools.prompt_preparation.layouts.layout import Layout
from tools.prompt_preparation.layouts.references import reference_of
from tools.prompt_preparation.settings import Settings


def rows_layout(settings: Settings) -> Layout:
    """Return the form whose columns the settings name."""
    keys = {
        "prompt": settings.prompt_key or "prompt", "response": settings.response_key or "response",
        "answer": settings.answer_key or "answer", "grader": settings.grader_key or "grader", "domain": "domain",
        "uid": "uid",
    }  # fmt: skip

    def read(row: Row, settings: Settings) -> Draft:
        return _read(row, settings, keys)

    top = {name for key in (*keys.values(), "tools") for name in (key, key.partition(".")[0])}
    prompt = frozenset({keys["prompt"]}), frozenset({keys["prompt"].partition(".")[0]})
    return Layout(name="rows", needs=prompt, marks=(frozenset({"prompt"}),), columns=frozenset(top), read=read)


def _read(row: Row, settings: Settings, keys: dict[str, str]) -> Draft:
    prompt = required(row, keys["prompt"], "--prompt-key")
    refuse_tools(row.value.get("tools"))
    draft = draft_of(prompt, with_response=settings.responses, keep_system=settings.system_messages == "keep")
    response = lookup(row, keys["response"])
    if settings.responses and response is not MISSING and response is not None:
        if draft.response is not None:
            raise Fault("a response, and messages that end with another", "one of them", "--response-key")
        draft = replace(draft, response=response_of(response))
    return replace(
        draft,
        is_text=isinstance(prompt, str) and draft.messages == ({"role": "user", "content": prompt},),
        domain=plain_value(lookup(row, "domain"), "domain", "--domain-key") or "",
        uid=text_or_none(lookup(row, "uid"), "uid"),
        reference=_reference(lookup(row, keys["answer"]), lookup(row, keys["grader"])),
    )


def _reference(value: object, grader: object) -> Reference:
    """Return the answer as the row has it; a structure, such as tests of code, in the form that its grader reads."""
    name = None if isinstance(grader, Missing) else plain_value(grader, "grader", "--grader-key")
    if name is not None and name not in GRADERS:
        raise Fault(f"grader is {show(name)}", f"one of {', '.join(GRADERS)}", "--grader-key")
    if isinstance(value, list | dict):
        return reference_of(value, "answer", name)
    answer = text_or_none(value, "answer")
    return Reference(answer=answer, grader=name if answer is not None else None)
