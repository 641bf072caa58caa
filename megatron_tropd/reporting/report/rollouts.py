"""Sampled rollouts as HTML: guidance shaded, tokens outside the trust region underlined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_tropd.reporting.report.page import section, text
from megatron_tropd.reporting.rollout_samples import RolloutSample, TokenMark, read_samples

SAMPLES_SHOWN = 4
LONGEST_TEXT = 6000


def rollouts(directory: Path) -> str:
    """A few rollouts of the first and of the last step that has rollouts."""
    files = sorted(directory.glob("step_*.jsonl"))
    chosen = list(dict.fromkeys([*files[:1], *files[-1:]]))
    parts = [_step(path) for path in chosen]
    legend = (
        '<p class="small"><span class="soft">Prompt</span>, <span class="guidance">guidance by the teacher</span>, '
        'text of the student, <mark class="rejected">tokens that the gate rejects</mark>.</p>'
    )
    return section("Rollouts", legend, *parts) if any(parts) else ""


def _step(path: Path) -> str:
    samples = read_samples(path)[:SAMPLES_SHOWN]
    number = int(path.stem.removeprefix("step_"))
    return f"<h3>Step {number}</h3>" + "".join(_sample(sample) for sample in samples) if samples else ""


def _sample(sample: RolloutSample) -> str:
    facts = [f"prompt {sample.uid}", f"sample {sample.sample_index}", f"finish: {sample.finish}"]
    verdict = ""
    if sample.correct is not None:
        verdict = ' &middot; <b class="good">right</b>' if sample.correct else ' &middot; <b class="bad">wrong</b>'
    guidance = f'<span class="guidance">{text(_short(sample.guidance))}</span>' if sample.guidance else ""
    written = text(_short(sample.response)) if sample.tokens is None else _marked(sample.tokens)
    return (
        f'<div class="rollout"><div class="soft small">{text(" / ".join(facts))}{verdict}</div>'
        f'<div class="text"><span class="soft">{text(_short(sample.prompt))}</span>{guidance}{written}</div></div>'
    )


def _marked(tokens: Sequence[TokenMark]) -> str:
    parts: list[str] = []
    length = 0
    for index, mark in enumerate(tokens):
        length += len(mark.text)
        if length > LONGEST_TEXT:
            parts.append(text(f" [... {len(tokens) - index} tokens more]"))
            break
        shown = text(mark.text)
        parts.append(f'<mark class="rejected">{shown}</mark>' if mark.trusted is False else shown)
    return "".join(parts)


def _short(long: str) -> str:
    if len(long) <= LONGEST_TEXT:
        return long
    return f"{long[:LONGEST_TEXT]} [... {len(long) - LONGEST_TEXT} characters more]"
