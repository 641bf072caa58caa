"""report.json, the data set card and the printed table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from tools.prompt_preparation.benchmarks import Benchmarks
from tools.prompt_preparation.drafts import REASONS
from tools.prompt_preparation.settings import Settings
from tools.prompt_preparation.sources import FoundFile
from tools.prompt_preparation.tally import Tally

_SHOWN_QUESTION = 200
_SHOWN_EXAMPLES = 3

CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
---

Prompts for `--prompt-data`, made by `tools/prepare_prompts.py` of megatron_tropd. `report.json` has the settings, the
sources, and what was left out.
"""
"""README.md of the output: it says which files are the rows."""


def document(
    settings: Settings, layout: str, unit: str, tally: Tally, benchmarks: Benchmarks,
    sources: Sequence[FoundFile], benchmark_files: Sequence[FoundFile],
) -> dict[str, Any]:  # fmt: skip
    """Return the content of report.json: the same for the same input and flags, on every machine."""
    return {
        "settings": settings.recorded(),
        "format": layout,
        "sources": [file.recorded() for file in sources],
        "rows": {"read": tally.read, "written": tally.written},
        "left_out": {
            reason: {"rows": tally.left_out[reason], "examples": tally.examples[reason]}
            for reason in REASONS
            if tally.left_out[reason]
        },
        "domains": dict(sorted(tally.domains.items())),
        "graders": dict(sorted(tally.graders.items())),
        "answers": tally.num_answers,
        "answers_left_out": dict(sorted(tally.answers_left_out.items())),
        "responses": tally.num_responses,
        "lengths": {"unit": unit, "prompt": _length(tally, "prompt"), "response": _length(tally, "response")},
        "stripped": {affix: tally.stripped[affix] for affix in (*settings.strip_prefix, *settings.strip_suffix)},
        "take": {
            name: {"asked": count, "available": tally.available[name], "taken": tally.domains[name]}
            for name, count in settings.take
        },
        "contamination": {
            "files": [file.recorded() for file in benchmark_files],
            "questions": len(benchmarks.questions),
            "collided": [_collided(benchmarks, tally, number) for number in _most_first(tally)],
        },
        "notes": list(notes(settings, tally)),
    }


def _length(tally: Tally, what: str) -> dict[str, float]:
    count = tally.written if what == "prompt" else tally.num_responses
    return {"mean": round(tally.sums[what] / max(count, 1), 1), "max": tally.maxima[what]}


def _most_first(tally: Tally) -> list[int]:
    return sorted(tally.collisions, key=lambda number: (-tally.collisions[number], number))


def _collided(benchmarks: Benchmarks, tally: Tally, number: int) -> dict[str, Any]:
    question = benchmarks.questions[number]
    return {
        "question": question.place, "text": question.text[:_SHOWN_QUESTION], "rows": tally.collisions[number],
        "examples": tally.collision_examples[number],
    }  # fmt: skip


def notes(settings: Settings, tally: Tally) -> Iterator[str]:
    """Yield what a user should look at: flags that met no row, and domains with fewer rows than were asked for."""
    for flag, affixes in (("--strip-prefix", settings.strip_prefix), ("--strip-suffix", settings.strip_suffix)):
        for affix in affixes:
            if not tally.stripped[affix]:
                yield f"{flag} {affix!a}: no prompt has it"
    for name, _ in settings.domain_map:
        if name not in tally.mapped_domains:
            yield f"--domain-map {name}=...: no row is of this domain"
    for name, count in settings.take:
        if tally.available[name] < count:
            yield f"--take {name}={count}: only {tally.available[name]} rows are of this domain"


def as_json(report: dict[str, Any]) -> str:
    """Return the text of report.json."""
    return json.dumps(report, indent=1, ensure_ascii=False) + "\n"


def table(tally: Tally, report: dict[str, Any]) -> str:
    """Return the table that is printed."""
    lines = [f"{'rows read':<15}{tally.read:>12,}"]
    for reason, meaning in REASONS.items():
        if count := tally.left_out[reason]:
            examples = ", ".join(tally.examples[reason][:_SHOWN_EXAMPLES])
            lines.append(f"{'- ' + reason:<15}{count:>12,}  {meaning} (such as {examples})")
    lines.append(f"{'rows written':<15}{tally.written:>12,}  {_counts(report['domains'])}")
    for what, count in report["answers_left_out"].items():
        lines.append(f"answers left out{count:>11,}  {what}")
    for hit in report["contamination"]["collided"][:_SHOWN_EXAMPLES]:
        lines.append(f"{hit['rows']:>27,}  rows hold {hit['question']}: {hit['text'][:60]!a}")
    lines += [f"note: {note}" for note in report["notes"]]
    return "\n".join(lines)


def _counts(domains: dict[str, int]) -> str:
    return ", ".join(f"{name or '(no domain)'} {count:,}" for name, count in domains.items())
