"""Sampled rollouts as HTML: guidance shaded, tokens that the gate rejects underlined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_tropd.reporting.report.page import section, text
from megatron_tropd.reporting.rollout_samples import RolloutSample, TokenMark, read_samples
from megatron_tropd.reporting.run_directory import step_of

SAMPLES_SHOWN = 4
LONGEST_TEXT = 6000
SPECIAL = "[special token]"


def rollouts(directory: Path) -> str:
    """A few rollouts of the first and of the last step that has rollouts."""
    files = sorted(directory.glob("step_*.jsonl"))
    chosen = dict.fromkeys([*files[:1], *files[-1:]])
    steps = {step_of(path): read_samples(path)[:SAMPLES_SHOWN] for path in chosen}
    shown = [sample for samples in steps.values() for sample in samples]
    parts = [
        f"<h3>Step {step}</h3>{''.join(_sample(sample) for sample in samples)}"
        for step, samples in steps.items()
        if samples
    ]
    return section("Rollouts", _legend(shown), *parts) if shown else ""


def _legend(samples: Sequence[RolloutSample]) -> str:
    """What the looks of the texts mean; only of what these samples can have."""
    looks = ['<span class="soft">Prompt</span>']
    if any(sample.guidance for sample in samples):
        looks.append('<span class="guidance">guidance by the teacher</span>')
    looks.append("text of the student")
    if any(sample.tokens is not None for sample in samples):
        looks.append('<mark class="rejected">tokens that the gate rejects</mark>')
    return f'<p class="small">{", ".join(looks)}.</p>'


def _sample(sample: RolloutSample) -> str:
    prompt = f"prompt {sample.uid}" + (f" ({sample.name})" if sample.name else "")
    facts = [prompt, f"sample {sample.sample_index}", f"finish: {sample.finish}"]
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
        # A special token has no text, and the student's stop token may be the one that the teacher would not write.
        parts.append(text(mark.text) if mark.trusted else f'<mark class="rejected">{text(mark.text or SPECIAL)}</mark>')
    return "".join(parts)


def _short(long: str) -> str:
    if len(long) <= LONGEST_TEXT:
        return long
    return f"{long[:LONGEST_TEXT]} [... {len(long) - LONGEST_TEXT} characters more]"
