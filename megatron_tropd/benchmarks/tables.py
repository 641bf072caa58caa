"""Tables of results as text and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.benchmarks.paper_results import PAPER
from megatron_tropd.benchmarks.protocol import BENCHMARKS
from megatron_tropd.benchmarks.results import Result, model_name, read_results
from megatron_tropd.benchmarks.statistics import Comparison, Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells of a table; the first row is its head."""

    rows: tuple[tuple[str, ...], ...]

    def text(self) -> str:
        """Return aligned columns."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in self.rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    def markdown(self) -> str:
        """Return a Markdown table."""
        head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in self.rows]
        rule = ["---", *("---:" for _ in head[1:])]
        return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def percent(estimate: Estimate) -> str:
    """Return a mean with its standard error, in percent: ``38.54 +- 7.12``."""
    error = estimate.standard_error
    return f"{100 * estimate.mean:.2f}" + ("" if error is None else f" +- {100 * error:.2f}")


def results_table(runs: Mapping[str, Mapping[str, Result]], paper_settings: Sequence[str] = ()) -> Table:
    """Return one row a model, and one for each printed row of the paper's settings.

    Args:
        runs: name of a model -> its complete benchmarks.
        paper_settings: keys of ``PAPER``.
    """
    names = [name for name in BENCHMARKS if any(name in results for results in runs.values())]
    head = ("model", *(BENCHMARKS[name].title for name in names), "mean")
    rows = [head]
    for model, results in runs.items():
        estimates = [results[name].estimate() if name in results else None for name in names]
        means = [100 * found.mean if found else None for found in estimates]
        rows.append((model, *(percent(found) if found else "" for found in estimates), _mean(means)))
    for key in paper_settings:
        setting = PAPER[key]
        for row in setting.rows:
            label = f"paper, {setting.student}, {row.method}"
            printed = [row.scores.get(name) for name in names]
            rows.append((label, *("" if value is None else f"{value:.2f}" for value in printed), _mean(printed)))
    return Table(rows=tuple(rows))


def models_table(outputs: Sequence[Path], paper_settings: Sequence[str]) -> Table:
    """Return :func:`results_table` of the runs in these directories; errors as :func:`read_results`."""
    runs = {}
    for output in outputs:
        name = model_name(output)
        runs[name if name not in runs else f"{name} ({output})"] = read_results(output)
    return results_table(runs, paper_settings)


def _mean(values: Sequence[float | None]) -> str:
    """The mean over all columns; empty where one is missing, because it could not be compared."""
    found = [value for value in values if value is not None]
    return f"{sum(found) / len(found):.2f}" if found and len(found) == len(values) else ""


def metrics_table(results: Mapping[str, Result]) -> Table:
    """Return every metric of every benchmark of one model, and how its responses ended."""
    rows = [("benchmark", "metric", "score", "questions", "responses", "cut off", "mean tokens")]
    for name, result in results.items():
        summary = result.summary()
        ends = f"{100 * summary['truncated']:.1f}%", f"{summary['mean_tokens']:.0f}"
        counts = str(summary["num_questions"]), str(summary["num_responses"])
        for metric in BENCHMARKS[name].metrics:
            rows.append((BENCHMARKS[name].title, metric, percent(result.estimate(metric)), *counts, *ends))
    return Table(rows=tuple(rows))


def comparison_table(comparisons: Mapping[str, Comparison], first: str, second: str) -> Table:
    """Return differences in percentage points with their intervals.

    Args:
        comparisons: benchmark, or ``mean`` for all of them -> comparison.
        first: name of the model whose scores are reduced by those of the second.
        second: name of the other one.
    """
    rows = [("benchmark", f"{first} - {second}", "95% interval", "p")]
    for name, found in comparisons.items():
        title = BENCHMARKS[name].title if name in BENCHMARKS else name
        interval = f"[{100 * found.low:+.2f}, {100 * found.high:+.2f}]"
        rows.append((title, f"{100 * found.difference:+.2f}", interval, f"{found.p_value:.4f}"))
    return Table(rows=tuple(rows))
