"""Everything that decides what is written; the report records it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

Format = Literal["auto", "openthoughts3", "rl", "nemotron-sft", "nemotron-rl", "rows"]
SINGLE_FILES = (".jsonl", ".parquet")
"""Suffixes of --save that give one file instead of a directory of shards."""
_OTHER_FILES = (".json", ".ndjson", ".csv", ".gz", ".zst", ".bz2", ".xz")
DEFAULT_NGRAM = 13
_OF_ROWS = ("prompt_key", "response_key", "answer_key", "grader_key")
_OF_DECONTAMINATION = ("question_key", "ngram", "short_question")


class UsageError(ValueError):
    """The command line cannot be used; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The flags of the command by their names; None where a flag was not given."""

    prompt_data: tuple[str, ...]
    save: str
    format: Format = "auto"
    prompt_key: str | None = None
    response_key: str | None = None
    answer_key: str | None = None
    grader_key: str | None = None
    uid_key: str | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    responses: bool = False
    system_messages: Literal["keep", "drop"] = "keep"
    prompt_form: Literal["auto", "messages", "text"] = "auto"
    strip_prefix: tuple[str, ...] = ()
    strip_suffix: tuple[str, ...] = ()
    prompt_suffix: str | None = None
    where: tuple[tuple[str, str], ...] = ()
    domain: str | None = None
    domain_key: str | None = None
    domain_map: tuple[tuple[str, str], ...] = ()
    domains: tuple[str, ...] = ()
    grader: Literal["auto", "math", "choice", "instructions", "code", "exact"] = "auto"
    require_answer: bool = False
    duplicates: Literal["drop", "keep"] = "drop"
    conflicting_answers: Literal["drop", "keep-first"] = "drop"
    tokenizer: str | None = None
    max_prompt_length: int | None = None
    max_response_length: int | None = None
    on_long_response: Literal["drop", "keep"] | None = None
    decontaminate: tuple[str, ...] = ()
    question_key: str | None = None
    ngram: int | None = None
    short_question: Literal["contained", "equal"] | None = None
    take: tuple[tuple[str, int], ...] = ()
    max_rows: int | None = None
    seed: int = 0
    shard_rows: int = 50_000
    write_dropped: bool = False

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise UsageError("\n".join(problems))

    def _problems(self) -> Iterator[str]:
        """Yield one line for each thing that cannot be meant."""
        for name in ("max_prompt_length", "max_response_length", "max_rows", "shard_rows", "ngram"):
            if (value := getattr(self, name)) is not None and value < 1:
                yield f"{flag_of(name)} {value} must be at least 1"
        if self.save.endswith(_OTHER_FILES):
            yield f"--save {self.save}: expected a directory, or a file that ends in {' or '.join(SINGLE_FILES)}"
        if self.domain is not None and self.domain_key is not None:
            yield "--domain and --domain-key: give one of them"
        for name in ("where", "domain_map", "take"):
            keys = [key for key, _ in getattr(self, name)]
            if twice := {key for key in keys if keys.count(key) > 1}:
                yield f"{flag_of(name)} names {', '.join(sorted(twice))} twice"
        if short := [f"{domain}={count}" for domain, count in self.take if count < 1]:
            yield f"--take {' '.join(short)} must be at least 1"
        yield from self._without_effect()

    def _without_effect(self) -> Iterator[str]:
        """Yield one line for each flag that the others leave without effect."""
        given = {field.name for field in fields(self) if getattr(self, field.name) not in (None, ())}
        if self.format != "rows":
            for name in sorted(given.intersection(_OF_ROWS)):
                yield f"{flag_of(name)} is read by --format rows only"
        if not self.decontaminate:
            for name in sorted(given.intersection(_OF_DECONTAMINATION)):
                yield f"{flag_of(name)} has no effect without --decontaminate"
        if not self.responses and self.max_response_length is not None:
            yield "--max-response-length has no effect without --responses"
        if self.max_response_length is None and self.on_long_response is not None:
            yield "--on-long-response has no effect without --max-response-length"

    @property
    def is_file(self) -> bool:
        """Whether one file is written, and not a directory."""
        return self.save.endswith(SINGLE_FILES)

    def recorded(self) -> dict[str, Any]:
        """Return the settings for the report, without the place that is written to."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "save"}


def flag_of(name: str) -> str:
    """Return the flag of a field."""
    return f"--{name.replace('_', '-')}"
