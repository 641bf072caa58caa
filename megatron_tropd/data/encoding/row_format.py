"""Which keys of a row are read and with what limits, and the error about a row that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFormat:
    """How the rows of the data are read.

    Keys may be nested: ``reward_model.ground_truth``, or ``conversations.0.value`` for an element of a list.
    """

    prompt_key: str = "prompt"
    response_key: str = "response"
    """"" if responses are not used: then they are not read."""
    answer_key: str = "answer"
    grader_key: str = "grader"
    domain_key: str = "domain"
    uid_key: str = "uid"
    tools_key: str = "tools"
    """Tool descriptions for the chat template."""
    chat_template: bool = False
    """Whether prompts are wrapped in the tokenizer's chat template (--apply-chat-template); else they are raw text."""
    max_prompt_length: int
    """In tokens; a longer prompt is a bad row."""
    max_response_length: int
    """In tokens, without the stop token."""
    on_long_response: Literal["cut", "skip", "error"] = "cut"
    """What to do with a longer teacher response: keep its first tokens, leave the row out, or call it a bad row."""
    on_bad_row: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        if self.max_prompt_length < 1 or self.max_response_length < 1:
            raise ValueError(
                f"--max-prompt-length {self.max_prompt_length} and --max-response-length "
                f"{self.max_response_length} must both be at least 1"
            )
        if self.on_bad_row not in ("error", "skip"):
            raise ValueError(f"--on-bad-row {self.on_bad_row!r}: expected error or skip")
        if self.on_long_response not in ("cut", "skip", "error"):
            raise ValueError(f"--on-long-response {self.on_long_response!r}: expected cut, skip or error")

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys, "" among them for what is not read."""
        return (
            self.prompt_key, self.response_key, self.answer_key, self.grader_key, self.domain_key, self.uid_key,
            self.tools_key,
        )  # fmt: skip

    @property
    def columns(self) -> frozenset[str]:
        """The top-level keys that are read from a row."""
        return frozenset(name for key in self.keys if key for name in (key, key.partition(".")[0]))


class Fault(Exception):
    """The reason why a row cannot be used; reported as a BadRow with the row's place."""

    def __init__(self, found: str, expected: str, flag: str = "") -> None:
        super().__init__(found)
        self.found, self.expected, self.flag = found, expected, flag
