"""Directories of rows as ``examples/paper/`` writes them, made by the classes that write real ones."""

from __future__ import annotations

import json

from megatron_tropd.benchmarks.protocol import BENCHMARKS
from megatron_tropd.reporting.run_directory import RunDirectory
from tests.test_benchmark_tables import result, written
from tests.test_reporting_files import step_report


def make_row(out, row="opd", *, table="table1", setting="skywork-math", title=None):
    """The directory of a row, with its ``row.json``."""
    path = out / table / setting / row
    path.mkdir(parents=True)
    content = {"table": table, "setting": setting, "row": row, "title": title or row, "method_flags": []}
    (path / "row.json").write_text(json.dumps(content))
    return path


def make_run(path, *, steps=3, evaluations=(), iterations=3, config=None, changes=None):
    """A run directory.

    Args:
        path: where.
        steps: how many were trained.
        evaluations: reports.
        iterations: its --train-iters.
        config: more flags.
        changes: step -> fields of its report.
    """
    flags = {"train-iters": iterations, **(config or {})}
    with RunDirectory.create(path, config=flags, resume=False) as run:
        for step in range(1, steps + 1):
            run.step(step_report(step, **(changes(step) if changes else {})))
        for report in evaluations:
            run.evaluation(report)
    return path


def make_benchmark(path, means, *, samples=2, **protocol):
    """A benchmark's output: name -> mean of each question."""
    protocol["samples"] = dict.fromkeys(BENCHMARKS, samples)
    return written(path, [result(name, values, samples) for name, values in means.items()], **protocol)
