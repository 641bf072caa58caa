"""OpenThoughts3: ``{difficulty, source, domain, conversations: [{from: human | gpt, value}]}``."""

from __future__ import annotations

from dataclasses import replace

from megatron_tropd.data.encoding.fields import plain_value
from megatron_tropd.data.reading.rows import Row
from tools.prompt_preparation.drafts import Draft
from tools.prompt_preparation.layouts.conversations import draft_of, required
from tools.prompt_preparation.layouts.layout import Layout, sets
from tools.prompt_preparation.settings import Settings


def _read(row: Row, settings: Settings) -> Draft:
    turns = required(row, "conversations")
    draft = draft_of(turns, with_response=settings.responses, keep_system=settings.system_messages == "keep")
    return replace(draft, domain=plain_value(row.value.get("domain"), "domain", "") or "")


OPENTHOUGHTS3 = Layout(
    name="openthoughts3", needs=sets("conversations"), marks=sets("conversations domain"),
    columns=frozenset({"conversations", "domain"}), read=_read,
)  # fmt: skip
