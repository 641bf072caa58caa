"""The page of the study, from its results alone: the same results give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tools.study.claims import (
    ACCURACY_CLAIMS,
    CURVE_CLAIMS,
    HARSH,
    LONG,
    MAIN,
    OTHER_CLAIMS,
    OUR_CLAIMS,
    Judgement,
    judge,
    number_of_comparisons,
)
from tools.study.comparisons import (
    ENTROPY,
    GRAD_NORM,
    STUDENT,
    TRUST_FIRST,
    TRUST_LAST,
    Condition,
    Table,
)
from tools.study.formatting import difference_text, markdown, mean_text
from tools.study.methods import METHODS
from tools.study.page_text import ABOUT, AFTER_CLAIMS, COLUMNS, DECODING_NAMES, LIMITS, MAKE, RULE, WORLD_TEXT
from tools.study.plan import HARSH_METHODS, LONG_METHODS, WARNING_METHODS, WARNING_WORLD, Cell, full_plan
from tools.study.results import DECODINGS, Result
from tools.study.statistics import Verdict

BASELINE = "opd"
_MARKS = {Verdict.HOLDS: "**yes**", Verdict.OPPOSITE: "**no**", Verdict.OPEN: "?", Verdict.NOT_RUN: "not run"}


def page(results: Sequence[Result], figures: Mapping[tuple[Condition, str], str]) -> str:
    """The Markdown page.

    Args:
        results: of the study, complete or not; what is missing is said.
        figures: (condition, quantity) -> path of the figure, as the page links it.
    """
    table = Table(results)
    parts = [
        "# The miniature study",
        "<!-- Written by examples/miniature_study/report.py from results.jsonl; do not edit. -->",
        ABOUT,
        _facts(results),
        "## What holds here",
        RULE.format(comparisons=number_of_comparisons()),
        _summary(table),
        AFTER_CLAIMS,
        *_claims(table),
        "## The worlds",
        _worlds(table),
        "## Results",
        COLUMNS,
        *(_results(table, condition, tuple(METHODS), f"{condition.world}") for condition in MAIN),
        _results(table, HARSH, HARSH_METHODS, f"{HARSH.world} at three times the learning rate ({HARSH.lr:g})"),
        _results(table, LONG, LONG_METHODS, f"{LONG.world}, {LONG.steps} steps"),
        _warning(table),
        "## Curves",
        _figures(figures),
        "## Limits",
        LIMITS,
        "## Make it again",
        MAKE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(results: Sequence[Result]) -> str:
    planned = full_plan()
    done = {result.cell for result in results}
    missing = [cell for cell in planned if cell not in done]
    lines = [f"{len(results)} runs, {math.fsum(run.cpu_seconds for run in results) / 3600:.1f} CPU hours."]
    if missing:
        share = f"{len(missing)} of the {len(planned)} planned runs are missing"
        lines.append(f"**Incomplete: {share}** ({_by_group(missing)}).")
    commits = sorted({result.commit for result in results})
    versions = sorted({", ".join(f"{name} {number}" for name, number in run.versions.items()) for run in results})
    lines.append(f"Code: {', '.join(commits)}. Versions: {'; '.join(versions)}.")
    return " ".join(lines)


def _by_group(cells: Sequence[Cell]) -> str:
    groups: dict[str, int] = {}
    for cell in cells:
        group = f"{cell.world}, learning rate {cell.lr:g}, {cell.steps} steps"
        groups[group] = groups.get(group, 0) + 1
    return "; ".join(f"{group}: {count}" for group, count in groups.items())


def _summary(table: Table) -> str:
    """All claims about accuracy at a glance: the verdicts by the three ways of decoding, in their order."""
    rows = []
    for claim in (*ACCURACY_CLAIMS, *OUR_CLAIMS):
        cells = []
        for condition in MAIN:
            verdicts = [judge(claim, table, condition, decoding).verdict for decoding in DECODINGS]
            not_run = set(verdicts) == {Verdict.NOT_RUN}
            cells.append("not run" if not_run else " / ".join(_MARKS[verdict] for verdict in verdicts))
        rows.append([claim.text, claim.source, *cells])
    return markdown(["claim", "source", *(condition.world for condition in MAIN)], rows)


def _claims(table: Table) -> list[str]:
    worlds = [condition.world for condition in MAIN]
    parts = []
    for decoding in DECODINGS:
        rows = [
            [claim.text, claim.source, *(_judged(judge(claim, table, condition, decoding)) for condition in MAIN)]
            for claim in (*ACCURACY_CLAIMS, *OUR_CLAIMS)
        ]
        parts += [f"### Judged by {DECODING_NAMES[decoding]}", markdown(["claim", "source", *worlds], rows)]
    curves = [
        [claim.text, claim.source, *(_judged(judge(claim, table, condition, quantity), digits=2) for condition in MAIN)]
        for quantity, claim in CURVE_CLAIMS
    ]
    parts += [
        "### Entropy at the end of the runs, and gradient norm",
        "Differences are in nats, and of norms.",
        markdown(["claim", "source", *worlds], curves),
    ]
    others = [
        [
            claim.text, f"{condition.world}, learning rate {condition.lr:g}, {condition.steps} steps",
            *(_judged(judge(claim, table, condition, decoding)) for decoding in DECODINGS),
        ]
        for condition, claim in OTHER_CLAIMS
    ]  # fmt: skip
    head = ["claim", "where", *(DECODING_NAMES[decoding] for decoding in DECODINGS)]
    return [*parts, "### A larger learning rate, and longer runs", markdown(head, others)]


def _judged(judgement: Judgement, digits: int = 1) -> str:
    if judgement.verdict is Verdict.NOT_RUN or judgement.least is None:
        return "not run"
    word = judgement.verdict.value
    if judgement.verdict is not Verdict.OPEN:
        word = f"**{word}**"
    text = f"{word}: {difference_text(judgement.least, digits)}"
    if judgement.least_pair is not None:
        first, second = judgement.least_pair
        text += f", least for {first} against {second}"
    return text


def _worlds(table: Table) -> str:
    rows = []
    for condition in MAIN:
        before = [mean_text(table.mean(condition, STUDENT, decoding)) for decoding in DECODINGS]
        trust = mean_text(table.mean(condition, BASELINE, TRUST_FIRST), digits=3)
        rows.append([f"**{condition.world}**", WORLD_TEXT[condition.world], *before, trust])
    head = ["world", "teacher and student", *(f"student, {DECODING_NAMES[name]}" for name in DECODINGS), "trusted"]
    return markdown(head, rows)


def _results(table: Table, condition: Condition, methods: Sequence[str], title: str) -> str:
    head = ["method", "", "seeds"]
    for decoding in DECODINGS:
        head += [DECODING_NAMES[decoding], "against OPD"]
    head += ["trusted", "entropy", "gradient norm"]
    before = [mean_text(table.mean(condition, STUDENT, decoding)) for decoding in DECODINGS]
    rows = [["student before", "", "", *(text for value in before for text in (value, "")), "", "", ""]]
    for method in methods:
        rows.append(_result_row(table, condition, method))
    return f"### {title}\n\n{markdown(head, rows)}"


def _warning(table: Table) -> str:
    """The results of the world that is no part of the study, where somebody ran it."""
    condition = Condition(world=WARNING_WORLD)
    if not any(table.runs(condition, method) for method in WARNING_METHODS):
        return ""
    return _results(table, condition, WARNING_METHODS, f"{WARNING_WORLD}, a warning and no part of the study")


def _result_row(table: Table, condition: Condition, method: str) -> list[str]:
    runs = table.runs(condition, method)
    name = [f"`{method}`", f"{METHODS[method].title} ({METHODS[method].source})"]
    if not runs:
        return [*name, "not run", *[""] * (2 * len(DECODINGS) + 3)]
    row = [*name, str(len(runs))]
    for decoding in DECODINGS:
        difference = table.difference(condition, method, BASELINE, decoding)
        compared = "" if method == BASELINE or difference is None else difference_text(difference)
        row += [mean_text(table.mean(condition, method, decoding)), compared]
    first, last = (table.mean(condition, method, name) for name in (TRUST_FIRST, TRUST_LAST))
    assert first is not None and last is not None
    entropy, norm = (mean_text(table.mean(condition, method, name), digits=2) for name in (ENTROPY, GRAD_NORM))
    return [*row, f"{first.mean:.3f} to {last.mean:.3f}", entropy, norm]


def _figures(figures: Mapping[tuple[Condition, str], str]) -> str:
    if not figures:
        return "No run has curves yet."
    return "\n\n".join(
        f"![{'Entropy' if quantity == ENTROPY else 'Gradient norm'} over the steps in {condition.world}]({path})"
        for (condition, quantity), path in figures.items()
    )
