"""What the figures of tables and of compared runs show, read from their axes."""

from __future__ import annotations

import math
from statistics import stdev

import pytest
from matplotlib.container import BarContainer

from tests.results_tree import make_benchmark, make_row, make_run
from tests.test_reporting_files import eval_report
from tools.results.collect import Results
from tools.results.compare_figures import MOST_POINTS, figure, groups, thinned
from tools.results.compare_input import load
from tools.results.figures import figure_1, figure_3, over_seeds, save_figures


def bars(axes):
    return {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.patches}


def test_bars_have_the_scores_their_errors_and_the_papers_numbers(tmp_path):
    row = make_row(tmp_path, "opd", title="OPD $x$")
    for seed, means in enumerate(([1.0, 0.0, 0.5], [0.0, 0.0, 0.0])):
        make_benchmark(row / f"seed-{seed}" / "benchmark", {"aime24": means})
    make_benchmark(make_row(tmp_path, "mine") / "seed-1" / "benchmark", {"aime24": [1.0, 0.0], "aime25": [1.0, 1.0]})
    make_row(tmp_path, "jsd")
    (table,) = Results.of(tmp_path).tables
    first, second = figure_1(table).axes
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["AIME 2024", "AIME 2025"]
    assert bars(first) == {0: 25.0, 1: 50.0} and bars(second) == {1: 100.0}
    segments = []
    for container in first.containers:
        if isinstance(container, BarContainer):
            ((low, high),) = container.errorbar[2][0].get_segments()
            segments.append((high[1] - low[1]) / 2)
    # Over seeds where there are two, else over questions.
    assert segments == pytest.approx([100 * stdev([0.5, 0.0]) / 2**0.5, 100 * stdev([1, 0]) / 2**0.5])
    (diamonds,) = (line for line in first.lines if line.get_label() == "paper")
    assert diamonds.get_xydata().tolist() == [[0.0, 35.83]]
    assert [label.get_text() for label in first.get_xticklabels()] == ["OPD \\$x\\$", "mine"]
    assert [words.get_text() for words in second.texts] == ["not measured"]


def test_figure_1_of_the_papers_table_has_its_bars(tmp_path):
    path = make_row(tmp_path, "tropd", table="table4", setting="qwen3")
    make_benchmark(path / "seed-1" / "benchmark", {"ifbench": [1.0, 0.0], "aime24": [1.0]})
    (table,) = Results.of(tmp_path).tables
    (axes,) = figure_1(table).axes
    assert axes.get_title(loc="left") == "IFBench" and bars(axes) == {0: 50.0}
    (diamonds,) = (line for line in axes.lines if line.get_label() == "paper")
    assert diamonds.get_ydata().tolist() == [42.18, 37.07, 36.05, 20.07]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["tropd", "OPD", "REOPOLD", "Qwen3-1.7B"]


def test_curves_are_means_over_seeds_in_a_band(tmp_path):
    def entropy(*values):
        return lambda step: {"metrics": {"student/entropy": values[step - 1]}}

    row = make_row(tmp_path, "opd")
    make_run(row / "seed-1" / "run", steps=4, changes=entropy(1.0, math.nan, math.nan, 3.0))
    make_run(row / "seed-2" / "run", steps=3, changes=entropy(2.0, 4.0, math.nan))
    make_run(make_row(tmp_path, "tropd") / "seed-1" / "run", changes=lambda step: {"metrics": {}})
    rows = Results.of(tmp_path).rows
    (axes,) = figure_3(rows, "entropy").axes
    (line,) = axes.lines
    assert line.get_label() == "opd" and line.get_xdata().tolist() == [1, 2, 3, 4]
    assert line.get_ydata().tolist() == [1.5, 4.0, pytest.approx(math.nan, nan_ok=True), 3.0]
    (band,) = axes.collections
    assert band.get_paths()[0].vertices[:, 1].max() >= 1.5 + stdev([1, 2]) / 2**0.5 - 1e-12
    assert len(figure_3(rows, "grad_norm").axes[0].lines) == 2
    assert over_seeds([([1], [1.0]), ([1], [2.0])]) == ([1], [1.5], [pytest.approx(0.5)])


def test_more_methods_than_colours_stay_apart(tmp_path):
    for number in range(9):
        make_run(make_row(tmp_path, f"m{number}") / "seed-1" / "run", steps=1)
    lines = figure_3(Results.of(tmp_path).rows, "grad_norm").axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 9


def test_nothing_to_draw_is_no_file(tmp_path):
    make_row(tmp_path, "opd")
    results = Results.of(tmp_path)
    assert save_figures(results.tables, results.rows, tmp_path / "figures") == []


def test_curves_of_runs_of_different_length_with_gaps_and_missing_metrics(tmp_path):
    def metrics(step):
        return {"loss": math.inf if step == 2 else float(step), "metrics": {"student/entropy": 0.5}}

    make_run(tmp_path / "a", steps=4, changes=metrics, evaluations=[eval_report(0, 0.25), eval_report(4, 0.5)])
    make_run(tmp_path / "b", steps=2, changes=lambda step: {"loss": 7.0, "metrics": {"own/x": 1.0}})
    runs = load([tmp_path / "a", tmp_path / "b"], None, [])
    assert list(groups(runs)) == ["eval", "train", "student", "time", "own", "tokens"]
    made = figure(runs, groups(runs)["train"])
    loss, *_ = made.axes
    assert [axes.get_title(loc="left") for axes in made.axes] == [
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
    ]
    assert [line.get_ydata().tolist() for line in loss.lines] == [
        [1.0, pytest.approx(math.nan, nan_ok=True), 3.0, 4.0],
        [7.0, 7.0],
    ]
    assert [words.get_text() for words in made.legends[0].get_texts()] == ["a", "b"]
    (accuracy,) = figure(runs, groups(runs)["eval"]).axes
    assert accuracy.lines[0].get_xydata().tolist() == [[0.0, 0.25], [4.0, 0.5]] and len(accuracy.lines) == 1
    assert [words.get_text() for words in figure(runs, ["own/x"]).legends[0].get_texts()] == ["b"]


def test_long_curves_are_averaged_over_groups():
    steps = [float(step) for step in range(1, 2 * MOST_POINTS + 2)]
    values = [math.nan if step <= 4 else 1.0 + step % 2 for step in steps]
    short_steps, short = thinned((steps, values))
    assert len(short) == len(short_steps) <= MOST_POINTS and short_steps[1] == 5.0
    assert math.isnan(short[0]) and short[1] == pytest.approx((2 + 1) / 2) and short[-1] > 0
    assert thinned((steps[:9], values[:9]))[0] == steps[:9]
