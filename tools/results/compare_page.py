"""The page of ``tools/compare_runs.py``: one HTML file, without scripts and without anything to fetch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from megatron_tropd.reporting.records import of_kind
from megatron_tropd.reporting.report import figure_style
from megatron_tropd.reporting.report.page import SVG, code, folded, inline_image, page, section, table, text
from tools.results import compare_scores
from tools.results.compare_figures import EVALUATION, figure, groups
from tools.results.compare_input import NamedRun

OPEN_GROUPS = (EVALUATION, "train", "tropd", "student", "rollout")
"""Groups of metrics whose curves are shown without a click."""
_ABSENT = object()


def comparison_page(runs: Sequence[NamedRun]) -> str:
    """The whole page."""
    title = f"{len(runs)} runs" if len(runs) > 1 else runs[0].name
    return page(
        f"{title} - megatron_tropd",
        (
            f'<h1>{text(title)}</h1><p class="soft">compared by megatron_tropd</p>',
            overview(runs),
            compare_scores.evaluations(runs),
            compare_scores.benchmarks(runs),
            curves(runs),
            flags(runs),
        ),
    )


def overview(runs: Sequence[NamedRun]) -> str:
    """Name, steps, commit and machine of each run, and what of it is damaged."""
    rows = [
        (
            text(named.name), _steps(named), _skipped(named), _commit(named.run.environment),
            _machine(named.run.environment), text(named.run.environment.get("started", "unknown")),
            code(named.run.path),
        )
        for named in runs
    ]  # fmt: skip
    problems = "".join(f'<p class="bad">{text(problem)}</p>' for named in runs for problem in named.run.problems)
    head = ("run", "steps", "skipped", "commit", "machine", "started", "directory")
    return section("Runs", table(head, rows, numbers=(1, 2)), problems)


def _steps(named: NamedRun) -> str:
    if not named.run.records:
        return "nothing recorded"
    return text(f"{named.run.unfinished} (unfinished)" if named.run.unfinished else named.run.last_step)


def _skipped(named: NamedRun) -> str:
    return str(sum(record["verdict"] == "skipped" for record in of_kind(named.run.records, "step")))


def _commit(environment: dict[str, Any]) -> str:
    git = environment.get("git")
    if not isinstance(git, dict) or not git.get("sha"):
        return "unknown"
    return code(str(git["sha"])[:12]) + (" with local changes" if git.get("dirty") else "")


def _machine(environment: dict[str, Any]) -> str:
    if not environment:
        return "unknown"
    gpus = Counter(map(str, environment.get("gpus") or ()))
    counted = [f"{number} x {kind}" for kind, number in gpus.items()] or [
        f"{environment.get('cpu_count', '?')} CPUs, no GPU"
    ]
    return text(f"{environment.get('host', 'unknown')}: {', '.join(counted)}")


def curves(runs: Sequence[NamedRun]) -> str:
    """One figure a group of metrics."""
    parts = []
    for group, names in groups(runs).items():
        svg = figure_style.svg(figure(runs, names))
        shown = inline_image(svg.encode(), SVG, f"Curves of {', '.join(names)}")
        title = f"{group}: {len(names)} metric" + ("s" if len(names) > 1 else "")
        parts.append(f"<h3>{text(title)}</h3>{shown}" if group in OPEN_GROUPS else folded(title, shown))
    return section("Curves", *parts)


def flags(runs: Sequence[NamedRun]) -> str:
    """The flags in which the runs differ."""
    known = [named for named in runs if named.run.config]
    unknown = [named.name for named in runs if not named.run.config]
    note = f'<p class="soft small">No configuration: {text(", ".join(unknown))}.</p>' if unknown else ""
    names = list(dict.fromkeys(name for named in known for name in named.run.config))
    rows = []
    for name in names:
        values = [named.run.config.get(name, _ABSENT) for named in known]
        if any(value != values[0] or type(value) is not type(values[0]) for value in values[1:]):
            rows.append((code(name), *(text("not given") if value is _ABSENT else code(value) for value in values)))
    if len(known) < 2:
        return section("Flags that differ", note)
    same = f'<p class="soft small">{len(names) - len(rows)} other flags are the same.</p>'
    shown = table(("flag", *(named.name for named in known)), rows)
    return section("Flags that differ", f'<div class="pairs">{shown}</div>' if rows else "", same, note)
