"""The sections of the report; each is made from data that was read from the run directory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from megatron_tropd.reporting.metric_names import METRICS
from megatron_tropd.reporting.progress.text import count, duration
from megatron_tropd.reporting.records import Record, of_kind, step_scalars
from megatron_tropd.reporting.report.page import code, folded, pairs, section, table, text
from megatron_tropd.reporting.report.plots import ordered_phases, standard_error

KEY_FLAGS = (
    "objective",
    "hf-checkpoint",
    "teacher-hf-checkpoint",
    "prompt-data",
    "eval-data",
    "train-iters",
    "rollout-batch-size",
    "n-samples-per-prompt",
    "max-response-length",
    "guidance-mode",
    "lr",
    "seed",
    "tensor-model-parallel-size",
    "pipeline-model-parallel-size",
    "rollout-engine",
)
"""The flags that are shown where the defaults of a configuration are not known."""


def headline(name: str, records: Sequence[Record], environment: dict[str, Any]) -> str:
    """Title and the few most important numbers."""
    steps = of_kind(records, "step")
    tiles = [(f"{decoding}, accuracy", _change(points)) for decoding, points in _by_decoding(records).items()]
    if steps:
        skipped = sum(record["verdict"] == "skipped" for record in steps)
        tiles.append(
            ("steps", f"{steps[-1]['step']}" + (f' <small class="bad">{skipped} skipped</small>' * (skipped > 0)))
        )
        tiles.append(("time in phases", duration(sum(sum(record["seconds"].values()) for record in steps))))
    boxes = "".join(
        f'<div class="tile"><b>{value}</b><span class="soft small">{text(label)}</span></div>' for label, value in tiles
    )
    where = ", ".join(str(environment[key]) for key in ("started", "host") if environment.get(key))
    return f'<h1>{text(name)}</h1><p class="soft">megatron_tropd run, {text(where)}</p><div class="tiles">{boxes}</div>'


def _by_decoding(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in of_kind(records, "eval"):
        groups.setdefault(record["decoding"], []).append(record)
    return groups


def _change(points: list[Record]) -> str:
    last = f"{100 * points[-1]['accuracy']:.1f}%"
    return last if len(points) == 1 else f"{last} <small>{_points(points)}</small>"


def _points(points: list[Record]) -> str:
    difference = 100 * (points[-1]["accuracy"] - points[0]["accuracy"])
    kind = "good" if difference > 0 else "bad" if difference < 0 else "soft"
    return f'<span class="{kind}">{difference:+.1f}</span>'


def result(records: Sequence[Record]) -> str:
    """Accuracy before and after, for each way of decoding."""
    rows = []
    for decoding, points in _by_decoding(records).items():
        first, last = points[0], points[-1]
        best = max(points, key=lambda record: record["accuracy"])
        moved = len(points) > 1
        rows.append(
            (
                code(decoding),
                _accuracy(first),
                _accuracy(last) if moved else "",
                _points(points) if moved else "",
                f'{100 * best["accuracy"]:.1f}% <small class="soft">step {best["step"]}</small>',
                f"{last['num_prompts']}",
                f"{last['mean_response_len']:.1f}",
                f"{100 * last['finished']:.1f}%",
            )
        )
    head = ("decoding", "first", "last", "points", "best", "prompts", "length", "finished")
    if not rows:
        return section("Result", '<p class="soft">No evaluation was recorded.</p>')
    note = (
        '<p class="soft small">Accuracy on held-out prompts, plus or minus one standard error over prompts. '
        "The best of many evaluations is an optimistic number.</p>"
    )
    return section("Result", table(head, rows, numbers=range(1, len(head))), note)


def _accuracy(record: Record) -> str:
    error = 100 * standard_error(record)
    return f'{100 * record["accuracy"]:.1f}% <small class="soft">&plusmn;{error:.1f}, step {record["step"]}</small>'


def configuration(config: dict[str, Any], config_text: str, environment: dict[str, Any]) -> str:
    """The flags that differ from their defaults where these are known, else the main flags; then all flags."""
    changed = environment.get("changed_flags")
    if changed is not None:
        caption, shown = "Flags that differ from their defaults.", changed
    else:
        named = {str(name).replace("_", "-"): value for name, value in config.items()}
        caption, shown = "The main flags.", {name: named[name] for name in KEY_FLAGS if name in named}
    command = " ".join(environment.get("command", ()))
    return section(
        "What ran",
        f"<pre>{text(command)}</pre>" if command else "",
        f'<p class="soft small">{caption}</p>{pairs(shown)}' if shown else "",
        folded("Whole configuration", f"<pre>{text(config_text)}</pre>" if config_text.strip() else ""),
    )


def timing(records: Sequence[Record]) -> str:
    """Wall seconds by phase."""
    steps = [record for record in of_kind(records, "step") if record["seconds"]]
    whole = sum(sum(record["seconds"].values()) for record in steps)
    rows = []
    for phase in ordered_phases(steps):
        spent = [record["seconds"][phase] for record in steps if phase in record["seconds"]]
        share = sum(spent) / whole if whole else 0.0
        bar = f'<span class="bar" style="width:{12 * share:.2f}rem"></span>'
        numbers = (duration(sum(spent)), f"{100 * share:.1f}%", f"{fmean(spent):.3g} s", f"{median(spent):.3g} s")
        rows.append((text(phase), *numbers, f"{len(spent)}", bar))
    rates = _finite(step_scalars(record).get("throughput/tokens_per_second") for record in steps)
    rate = f'<p class="soft small">Median throughput {count(median(rates))} response tokens/s.</p>' if rates else ""
    head = ("phase", "total", "share", "mean", "median", "steps", "")
    return section("Time", table(head, rows, numbers=range(1, 6)), rate)


def metrics(records: Sequence[Record]) -> str:
    """First, last and extreme values of every metric, with its meaning."""
    values: dict[str, list[float]] = {}
    for record in of_kind(records, "step"):
        for name, value in step_scalars(record).items():
            values.setdefault(name, []).append(value)
    known = [name for name in METRICS if name in values]
    rows = [_metric_row(name, values[name]) for name in [*known, *sorted(values.keys() - METRICS.keys())]]
    head = ("metric", "first", "last", "least", "most", "not finite", "meaning")
    return section("Metrics", folded(f"{len(rows)} metrics", table(head, rows, numbers=range(1, 6))) if rows else "")


def _metric_row(name: str, values: list[float]) -> tuple[str, ...]:
    finite = _finite(values)
    extremes = (min(finite), max(finite)) if finite else (math.nan, math.nan)
    numbers = (f"{value:.4g}" for value in (values[0], values[-1], *extremes))
    bad = len(values) - len(finite)
    meaning = METRICS[name].meaning if name in METRICS else ""
    return (code(name), *numbers, f"{bad}" if bad else "", f"<small>{text(meaning)}</small>")


def _finite(values: Any) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def environment_section(environment: dict[str, Any]) -> str:
    """Code, versions and machine."""
    git = environment.get("git") or {}
    packages = environment.get("packages") or {}
    shown = {
        "git": (git.get("sha") or "unknown") + (" (with local changes)" if git.get("dirty") else ""),
        "python": environment.get("python"),
        **{name: version for name, version in packages.items() if version},
        "platform": environment.get("platform"),
        "CPUs": environment.get("cpu_count"),
        "GPUs": ", ".join(environment.get("gpus") or ()) or "none",
    }
    earlier = [f"{launch.get('started')} on {launch.get('host')}" for launch in environment.get("earlier_launches", ())]
    launches = f'<p class="soft small">Resumed; earlier launches: {text("; ".join(earlier))}.</p>' if earlier else ""
    variables = folded("Environment variables", pairs(environment.get("environment") or {}))
    return section("Environment", launches, pairs(shown), variables) if environment else ""
