"""Rows of verl: ``{data_source, prompt, ability, reward_model: {ground_truth, style}, extra_info: {index}}``.

DAPO-Math-17k has a text as the ground truth; Skywork-OR1 a JSON text: of a list of answers for mathematics, of tests
for code.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_tropd.data.encoding.fields import plain_value
from megatron_tropd.data.encoding.row_format import Fault
from megatron_tropd.data.reading.rows import Row
from tools.prompt_preparation.drafts import Draft
from tools.prompt_preparation.layouts.conversations import as_object, draft_of, required, text_or_none
from tools.prompt_preparation.layouts.layout import Layout, sets
from tools.prompt_preparation.layouts.references import reference_of
from tools.prompt_preparation.settings import Settings

_GRADERS = {"math": "math", "code": "code"}
"""By the ability of a row, in lower case; of others the run's own grader decides."""


def _read(row: Row, settings: Settings) -> Draft:
    prompt = required(row, "prompt")
    draft = draft_of(prompt, with_response=settings.responses, keep_system=settings.system_messages == "keep")
    ability = (plain_value(row.value.get("ability"), "ability", "") or "").lower()
    reward = as_object(required(row, "reward_model"), "reward_model")
    extra = as_object(row.value.get("extra_info"), "extra_info")
    if "ground_truth" not in reward:
        raise Fault("reward_model has no ground_truth", "the reference answer under that key")
    return replace(
        draft, domain=ability, uid=text_or_none(extra.get("index"), "extra_info.index"),
        reference=reference_of(reward["ground_truth"], "ground_truth", _GRADERS.get(ability)),
    )  # fmt: skip


RL = Layout(
    name="rl", needs=sets("prompt reward_model"), marks=sets("prompt reward_model"),
    columns=frozenset({"prompt", "reward_model", "ability", "extra_info"}), read=_read,
)  # fmt: skip
