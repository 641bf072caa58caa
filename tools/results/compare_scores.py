"""The final scores of several runs, each with its difference from the first run that has one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_tropd.benchmarks.compare import compare
from megatron_tropd.benchmarks.protocol import BENCHMARKS
from megatron_tropd.benchmarks.tables import comparison_table, percent
from megatron_tropd.reporting.records import Record
from megatron_tropd.reporting.report.page import code, section, table, text
from megatron_tropd.reporting.report.plots import standard_error
from tools.results.compare_input import NamedRun
from tools.results.tree import read_benchmarks

_NOTE = '<p class="soft small">{}</p>'


def evaluations(runs: Sequence[NamedRun]) -> str:
    """Last evaluations of ``--eval-data``, each less that of the first run with the same decoding."""
    rows = []
    for decoding in dict.fromkeys(name for named in runs for name in named.run.final_evaluations()):
        first: Record | None = None
        for named in runs:
            record = named.run.final_evaluations().get(decoding)
            if record is None:
                rows.append((code(decoding), text(named.name), "not evaluated", "", "", ""))
                continue
            difference = "" if first is None else evaluation_difference(record, first)
            counts = f"{record['num_prompts']}", f"{record['step']}"
            rows.append((code(decoding), text(named.name), _share(record), difference, *counts))
            first = first or record
    head = ("decoding", "run", "accuracy", "less the first", "prompts", "step")
    note = (
        "Percent, with standard errors over prompts. An evaluation keeps no answers to single prompts, so the error of "
        "a difference is that of independent prompts; of the same prompts it is mostly smaller. Benchmarks are "
        "compared question by question."
    )
    return section("Final evaluations", table(head, rows, numbers=range(2, 6)), _NOTE.format(note) if rows else "")


def _share(record: Record) -> str:
    return _with_error(f"{100 * record['accuracy']:.2f}", standard_error(record))


def evaluation_difference(record: Record, first: Record) -> str:
    """Difference in percentage points; its standard error where both have one."""
    error = math.hypot(standard_error(record), standard_error(first))
    return _with_error(f"{100 * (record['accuracy'] - first['accuracy']):+.2f}", error)


def _with_error(value: str, error: float) -> str:
    return f"{value} &plusmn; {100 * error:.2f}" if math.isfinite(error) else value


def benchmarks(runs: Sequence[NamedRun]) -> str:
    """Scores on the benchmarks, and paired differences from the first run that has any."""
    measured = [(named.name, named.benchmark) for named in runs if named.benchmark is not None]
    scores, differences, refused = [], [], []
    for name, output in measured:
        found, problems = read_benchmarks(output)
        refused += [f"{name}: {problem}" for problem in problems]
        for key, result in found.items():
            scores.append((text(name), text(BENCHMARKS[key].title), text(percent(result.estimate()))))
    for name, output in measured[1:]:
        first, base = measured[0]
        try:
            compared = comparison_table(compare(output, base), name, first)
        except (OSError, TypeError, ValueError, KeyError) as error:
            refused.append(f"{name} and {first} are not compared: {error}")
        else:
            differences += [(text(name), *map(text, row)) for row in compared.rows[1:]]
    what = f"Less {measured[0][0]}, over the same questions" if len(measured) > 1 else ""
    return section(
        "Benchmarks",
        table(("run", "benchmark", "score"), scores, numbers=(2,)),
        f"<h3>{text(what)}</h3>" if differences else "",
        table(("run", "benchmark", "difference", "95% interval", "p"), differences, numbers=range(2, 5)),
        _NOTE.format(
            "Percent and percentage points; standard errors over questions; intervals from a paired bootstrap over "
            "questions, which says nothing about another training run."
        ) if scores else "",
        *(f'<p class="bad">{text(reason)}</p>' for reason in refused),
    )  # fmt: skip
