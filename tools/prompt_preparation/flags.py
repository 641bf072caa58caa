"""The command line, as Settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_tropd.flag_parser import FlagParser
from tools.prompt_preparation.drafts import GRADERS
from tools.prompt_preparation.settings import DEFAULT_NGRAM, Settings, UsageError, flag_of

_PAIRS = {"where": str, "domain_map": str, "take": int}
"""Flags whose values are NAME=VALUE, and what the value is."""


class _Parser(FlagParser):
    """Raises UsageError instead of exiting, so that all mistakes look alike."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the flags."""
    p = _Parser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )  # fmt: skip
    _add_data(p.add_argument_group("data"))
    _add_prompts(p.add_argument_group("prompts"))
    _add_answers(p.add_argument_group("domains and answers"))
    _add_choice(p.add_argument_group("what is left out"))
    return p


def _add_data(g: Any) -> None:
    g.add_argument("--prompt-data", nargs="+", metavar="SOURCE", required=True, help="what the training command takes")
    g.add_argument(
        "--save", metavar="PATH", required=True,
        help="directory of Parquet shards, or one file that ends in .jsonl or .parquet; must not exist",
    )  # fmt: skip
    g.add_argument(
        "--format", choices=("auto", "openthoughts3", "rl", "nemotron-sft", "nemotron-rl", "rows"),
        help="form of the rows (default: by their columns)",
    )  # fmt: skip
    for name in ("prompt", "response", "answer", "grader"):
        g.add_argument(f"--{name}-key", metavar="KEY", help=f"column of --format rows (default: {name})")
    g.add_argument("--uid-key", metavar="KEY", help="column that becomes source_uid (default: that of the format)")
    g.add_argument("--on-bad-row", choices=("error", "skip"), help="as in the training command (default: error)")
    g.add_argument("--shard-rows", type=int, metavar="N", help="rows of a shard (default: 50000)")
    g.add_argument("--write-dropped", action="store_true", help="write dropped.jsonl: every row that is left out")


def _add_prompts(g: Any) -> None:
    g.add_argument("--responses", action="store_true", help="keep the teacher's turn as the response")
    g.add_argument("--system-messages", choices=("keep", "drop"), help="default: keep")
    g.add_argument(
        "--prompt-form", choices=("auto", "messages", "text"),
        help="how prompts are written (default: messages; text where --format rows has texts)",
    )  # fmt: skip
    g.add_argument("--strip-prefix", nargs="+", metavar="TEXT", help="taken off the last message by the user")
    g.add_argument("--strip-suffix", nargs="+", metavar="TEXT", help="taken off the last message by the user")
    g.add_argument("--prompt-suffix", metavar="TEXT", help="added to the last message by the user, on a new line")


def _add_answers(g: Any) -> None:
    one = g.add_argument
    one("--where", nargs="+", metavar="KEY=VALUE", help="keep only rows with these values")
    one("--domain", metavar="NAME", help="domain of all rows")
    one("--domain-key", metavar="KEY", help="column of the domain (default: that of the format)")
    one("--domain-map", nargs="+", metavar="FROM=TO", help="other names for domains")
    one("--domains", nargs="+", metavar="NAME", help="keep only rows of these domains")
    one("--grader", choices=("auto", *GRADERS), help="how all answers are graded (default: by the format)")
    one("--require-answer", action="store_true", help="leave out rows without an answer")


def _add_choice(g: Any) -> None:
    one = g.add_argument
    one("--duplicates", choices=("drop", "keep"), help="rows whose prompt was kept before (default: drop)")
    one(
        "--conflicting-answers", choices=("drop", "keep-first"),
        help="a prompt that comes with several answers (default: drop, all its rows)",
    )  # fmt: skip
    one("--tokenizer", metavar="MODEL", help="counts lengths in tokens, with its chat template (default: characters)")
    one("--max-prompt-length", type=int, metavar="N", help="leave out longer prompts")
    one("--max-response-length", type=int, metavar="N", help="limit of --on-long-response")
    one("--on-long-response", choices=("drop", "keep"), help="rows with longer responses (default: drop)")
    one("--decontaminate", nargs="+", metavar="SOURCE", help="leave out prompts that hold a question of these files")
    one("--question-key", metavar="KEY", help="its column (default: question, problem, question_content or prompt)")
    one("--ngram", type=int, metavar="N", help=f"words in a row that make a collision (default: {DEFAULT_NGRAM})")
    one(
        "--short-question", choices=("contained", "equal"),
        help="a question of fewer words collides if the prompt contains it, or is equal to it (default: contained)",
    )  # fmt: skip
    one("--take", nargs="+", metavar="DOMAIN=N", help="at most so many rows of these domains, none of others")
    one("--max-rows", type=int, metavar="N", help="at most so many rows")
    one("--seed", type=int, metavar="N", help="of the choice of --take and --max-rows (default: 0)")


def parse(argv: Sequence[str], description: str | None = None) -> Settings:
    """Return the settings of a command line.

    Raises:
        UsageError: it cannot be used.
    """
    given = vars(parser(description).parse_args(argv))
    values = {name: _value(name, value) for name, value in given.items()}
    return Settings(**values)


def _value(name: str, value: Any) -> Any:
    if name in _PAIRS:
        return tuple(_pair(name, text) for text in value)
    if isinstance(value, list):
        value = tuple(value)
    if value in ("", ()) or (isinstance(value, tuple) and "" in value):
        raise UsageError(f"{flag_of(name)}: the value is empty; give one or leave the flag out")
    return value


def _pair(name: str, text: str) -> tuple[str, Any]:
    key, equals, value = text.rpartition("=") if name == "take" else text.partition("=")
    kind = _PAIRS[name]
    try:
        if not (key and equals and value):
            raise ValueError
        return key, kind(value)
    except ValueError:
        form = "DOMAIN=NUMBER" if kind is int else "NAME=VALUE"
        raise UsageError(f"{flag_of(name)} {text}: expected {form}") from None
