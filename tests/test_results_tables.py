"""Tables of directories of rows: cells by hand, standard errors by another formula, what is missing, and the paper."""

from __future__ import annotations

import csv
import itertools
import json
import re
from dataclasses import replace
from statistics import fmean, stdev

import numpy as np
import pytest

from megatron_tropd.reports import Accuracy
from tests.results_tree import make_benchmark, make_row, make_run
from tests.test_benchmark_tables import RESPONSES, cut
from tests.test_reporting_files import eval_report
from tools.collect_results import main
from tools.results.collect import Results, text
from tools.results.paper_tables import FIGURE_1, TABLES
from tools.results.tables import NOT_RUN, csv_rows

QUESTIONS = {"aime24": [1.0, 0.5, 0.0, 0.5], "aime25": [0.0, 0.5, 0.0, 0.0], "amc23": [1.0, 1.0, 0.5, 0.5]}


def lines_of(results, index=0):
    return {line.row or line.title: line for line in results.tables[index].lines}


def printed_rows():
    for table, printed in TABLES.items():
        for group in printed.groups:
            for row in group.rows:
                yield table, group.setting, row


def test_the_papers_averages_are_those_of_its_cells():
    for table, setting, row in printed_rows():
        assert row.scores.keys() == set(TABLES[table].columns)
        assert row.mean == pytest.approx(fmean(row.scores.values()), abs=0.0101), (table, setting, row.name)


def test_the_papers_cells_are_possible_counts():
    impossible = set()
    for table, _, row in [*printed_rows(), *(("figure1", "", row) for row in FIGURE_1)]:
        for name, value in row.scores.items():
            total = RESPONSES.get(name, 0)
            show = cut if name in ("aime24", "aime25", "amc23") else lambda share: round(share + 1e-9, 2)
            if total and not any(show(100 * count / total) == value for count in range(total + 1)):
                impossible.add((table, row.name, name))
    assert impossible == {("table4", "teacher", "gpqa_diamond")}


def test_tables_agree_but_for_one_cell():
    """A method of one setting has one score on a benchmark, wherever it is printed."""
    seen = {}
    for table, setting, row in printed_rows():
        name = {"TrOPD FKL": "TrOPD"}.get(row.name, row.name)
        for benchmark, value in row.scores.items():
            seen.setdefault((setting, name, benchmark), {}).setdefault(value, []).append(table)
    assert {key: value for key, value in seen.items() if len(value) > 1} == {
        ("skywork-math", "TrOPD", "amc23"): {78.51: ["table1", "table5"], 77.03: ["table3", "table6"]}
    }
    qwen = TABLES["table4"].group("qwen3")
    assert all(qwen.row(row.name).scores[name] == value for row in FIGURE_1[:3] for name, value in row.scores.items())


def test_the_arithmetic_of_the_errata():
    math = TABLES["table3"].group("skywork-math")
    tropd, opd, eopd, reopold = (math.row(name) for name in ("TrOPD", "OPD", "EOPD", "REOPOLD"))

    def general(row):
        return fmean(row.scores[name] for name in ("livecodebench_v6", "gpqa_diamond"))

    assert general(tropd) - general(opd) == pytest.approx(4.96, abs=0.006)
    assert tropd.mean - eopd.mean == pytest.approx(2.63) and tropd.mean - reopold.mean == pytest.approx(1.84)
    assert general(tropd) - general(reopold) == pytest.approx(2.37)
    assert fmean((tropd.scores | {"amc23": 78.51}).values()) == pytest.approx(40.93, abs=0.005)
    qwen = TABLES["table4"].group("qwen3")
    sets = ("aime24", "aime25", "amc23")
    gains = [qwen.row("tropd").scores[name] - qwen.row("opd").scores[name] for name in sets]
    assert gains[1] == pytest.approx(3.34) and fmean(gains) == pytest.approx(2.88, abs=0.005)


def test_a_name_means_one_row():
    for table, printed in TABLES.items():
        for group in printed.groups:
            for one, other in itertools.permutations(group.rows, 2):
                assert not other.is_named(one.name), (table, one.name, other.name)
    five = TABLES["table5"].group("Skywork_Math")
    assert five.row("jsd") is None and five.row("unknown", "OPD").name == "OPD"


def test_rows_of_the_recipes_are_the_papers():
    """Names that examples/paper gives its rows, and those that it adds to the paper's."""
    names = {
        "table1": "student opd fkl jsd entropy_opd clip_outlier mask_outlier fkl_outlier tropd",
        "table3": "student teacher opd eopd entropy_opd reopold_two_stage reopold tropd",
        "table4": "student teacher opd eopd entropy_opd reopold tropd",
        "table5": "student opd mask_outlier clip_outlier fkl fkl_outlier tropd_mask tropd_clip tropd",
        "table6": "student opd aopd tropd tropd_aopd",
    }
    for table, rows in names.items():
        group = TABLES[table].groups[0]
        assert [group.row(name) for name in rows.split()] == list(group.rows), table
    assert [TABLES["table3"].groups[1].row(name) for name in ("teacher", "fkl_reward", "tropd_cap")][1:] == [None, None]


def test_cells_of_one_seed(tmp_path):
    make_benchmark(make_row(tmp_path, title="Plain OPD") / "seed-0" / "benchmark", QUESTIONS)
    results = Results.of(tmp_path)
    page = text(results)
    # Means of 4 questions: sd of (1, .5, 0, .5) is sqrt(1/6), of (0, .5, 0, 0) is 1/4, of (1, 1, .5, .5) is sqrt(1/12).
    lines = [re.sub(r" {2,}", " | ", line) for line in page.splitlines()]
    ours = next(index for index, line in enumerate(lines) if line.startswith("Plain OPD"))
    assert lines[ours].endswith("here | 50.00 +- 20.41 q | 12.50 +- 12.50 q | 75.00 +- 14.43 q | 45.83 +- 9.32 q")
    assert lines[ours + 1] == " | paper | 35.83 | 29.16 | 75.39 | 46.79"
    assert "AIME 2024: 4 questions here, 30 in the paper." in page
    assert "78.51" in page and "not comparable" not in page


def test_standard_errors_over_seeds_and_over_questions(tmp_path):
    row, names = make_row(tmp_path), ("aime24", "aime25", "amc23")
    scores = np.random.default_rng(3).integers(0, 5, (3, 4, 7)) / 4  # [benchmarks, seeds, questions]
    for seed in range(4):
        means = {name: list(scores[index, seed]) for index, name in enumerate(names)}
        make_benchmark(row / f"seed-{seed}" / "benchmark", means, samples=4)
    line = lines_of(Results.of(tmp_path))["opd"]
    errors = []
    for name, found in zip(names, scores, strict=True):
        score = line.scores[name]
        errors.append(stdev(found.mean(axis=0)) / 7**0.5)
        assert (score.mean, score.over_questions) == pytest.approx((found.mean(), errors[-1]))
        assert score.over_seeds == pytest.approx(stdev(found.mean(axis=1)) / 4**0.5)
    mean = line.scores["mean"]
    assert (mean.mean, mean.over_questions) == pytest.approx((scores.mean(), np.sqrt(np.square(errors).sum()) / 3))
    assert mean.over_seeds == pytest.approx(stdev(scores.mean(axis=(0, 2))) / 4**0.5)
    shown = text(Results.of(tmp_path))
    assert "here, 4 seeds" in shown
    assert f"{100 * mean.mean:.2f} +- {100 * mean.over_seeds:.2f} s +- {100 * mean.over_questions:.2f} q" in shown


def test_what_is_missing_is_said_to_be_missing(tmp_path):
    make_benchmark(make_row(tmp_path, "opd") / "seed-1" / "benchmark", {"aime24": [1.0, 0.5]})
    make_row(tmp_path, "tropd")
    make_run(make_row(tmp_path, "jsd") / "seed-1" / "run", steps=2, iterations=5)
    make_run(make_row(tmp_path, "mask") / "seed-1" / "run")
    make_benchmark(make_row(tmp_path, "our-own") / "seed-1" / "benchmark", {"ifbench": [0.0, 1.0]})
    (table,) = Results.of(tmp_path).tables
    assert table.columns == ("aime24", "aime25", "amc23", "ifbench")
    status = {(row["method"], row["column"]): (row["status"], row["mean"], row["paper"]) for row in csv_rows(table)}
    assert status["opd", "aime24"] == ("measured", 75.0, 35.83)
    assert status["opd", "aime25"] == ("not measured", "", 29.16)
    assert status["opd", "mean"] == ("not measured", "", 46.79)
    assert status["tropd", "amc23"] == (NOT_RUN, "", 78.51)
    assert status["FKL", "amc23"] == (NOT_RUN, "", 4.21)
    assert status["jsd", "aime24"] == ("not measured (step 2 of 5)", "", 37.91)
    assert status["mask", "aime24"] == ("not measured", "", 37.08)
    assert status["our-own", "ifbench"] == ("measured", 50.0, "")
    assert [line.title for line in table.lines][-1] == "our-own" and len(table.lines) == len(
        TABLES["table1"].groups[0].rows
    ) + 1
    assert any("jsd, seed-1: the run is unfinished (step 2 of 5)" in note for note in table.notes)


def test_what_cannot_be_compared_is_noted(tmp_path):
    opd, tropd, jsd = (make_row(tmp_path, name) for name in ("opd", "tropd", "jsd"))
    make_benchmark(opd / "seed-1" / "benchmark", {"aime24": [1.0, 0.5], "amc23": [1.0]})
    make_benchmark(opd / "seed-2" / "benchmark", {"aime24": [1.0, 0.5, 0.0]})
    make_run(opd / "seed-10" / "run")
    make_benchmark(tropd / "seed-1" / "benchmark", {"amc23": [0.0]}, truncated="graded")
    make_benchmark(jsd / "seed-1" / "benchmark", {"amc23": [0.0]}, samples=4)
    results = Results.of(tmp_path)
    (table,) = results.tables
    assert [seed.name for row in results.rows for seed in row.seeds if row.row == "opd"] == [
        "seed-1",
        "seed-2",
        "seed-10",
    ]
    assert "aime24" not in lines_of(Results.of(tmp_path))["opd"].scores
    notes = "\n".join(table.notes)
    assert "opd, AIME 2024: seed-1, seed-2 were asked other questions; left out." in notes
    assert "opd, AMC 2023: without seed-2, which it has not measured." in notes
    assert "opd: without seed-10, which no benchmark has measured." in notes
    # The number of samples may differ.
    assert "AMC 2023: not measured alike, so not comparable: jsd, opd and tropd" in notes
    assert "AIME 2024: the rows were asked 2 and 3 questions." in notes


def test_a_table_of_evaluations_alone(tmp_path):
    domains = {"sums": Accuracy(accuracy=0.75, std_error=0.1, num_prompts=20)}
    for row, accuracies in {"opd": (0.25, 0.5), "tropd": (0.5,)}.items():
        path = make_row(tmp_path, row)
        for seed, accuracy in enumerate(accuracies):
            reports = [eval_report(0, 0.0), replace(eval_report(3, accuracy), domains=domains)]
            make_run(path / f"seed-{seed}" / "run", evaluations=reports)
    (table,) = Results.of(tmp_path).tables
    assert table.kind == "evaluations" and table.columns == ("greedy", "greedy, sums")
    lines = lines_of(Results.of(tmp_path))
    assert list(lines)[1] == "opd" and list(lines)[-1] == "tropd" and lines["JSD"].missing == NOT_RUN
    score = lines["opd"].scores["greedy"]
    assert score.mean == 0.375 and score.over_seeds == pytest.approx(stdev([0.25, 0.5]) / 2**0.5)
    assert score.over_questions == pytest.approx(0.05)
    page = text(Results.of(tmp_path))
    assert "37.50 +- 12.50 s +- 5.00 q" in page and "50.00 +- 5.00 q" in page and "75.00 +- 10.00 q" in page
    assert "not the paper's benchmarks" in page and "35.83" not in page and "paper  " not in page
    assert not any(row["paper"] for row in csv_rows(table))


def test_command_writes_page_numbers_and_figures(tmp_path, capsys):
    row = make_row(tmp_path / "out", title="<b>|x|")
    make_run(row / "seed-1" / "run")
    make_benchmark(row / "seed-1" / "benchmark", QUESTIONS)
    with (row / "seed-1" / "run" / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "step", "step": 4}\nnothing\n{"kind": "step", "st')
    (row / "seed-1" / "benchmark" / "scores" / "ifbench.jsonl").write_text("{}\n")
    other = {"benchmark": "mmlu_redux", "question": "q", "scores": {"x": [1.0]}, "finish": ["stop"], "tokens": [1]}
    (row / "seed-1" / "benchmark" / "scores" / "mmlu_redux.jsonl").write_text(json.dumps(other))
    assert main([str(tmp_path / "out" / "table1"), "--save", str(tmp_path / "page")]) == 0
    out, err = capsys.readouterr()
    assert "metrics.jsonl: 3 damaged lines left out (4, 5, 6)" in err and "ifbench is left out" in err
    assert "mmlu_redux is left out: it has no scores 'accuracy'" in err
    assert "50.00 +- 20.41 q" in out and "and 4 figures" in out
    page = (tmp_path / "page" / "results.md").read_text()
    assert "| &lt;b>\\|x\\| | here | 50.00 +- 20.41 q |" in page and "damaged lines" in page and "<b>" not in page
    for image in ("figure1_table1_skywork-math", "figure3_grad_norm_table1_skywork-math"):
        assert f"](figures/{image}.png)" in page
        assert all((tmp_path / "page" / "figures" / f"{image}.{kind}").stat().st_size > 4000 for kind in ("png", "svg"))
    with (tmp_path / "page" / "results.csv").open(newline="") as stream:
        cells = {(line["method"], line["column"]): line for line in csv.DictReader(stream)}
    assert float(cells["<b>|x|", "aime24"]["standard_error_over_questions"]) == pytest.approx(100 * (1 / 24) ** 0.5)
    assert cells["<b>|x|", "aime24"]["standard_error_over_seeds"] == "" and cells["JSD", "mean"]["paper"] == "47.9"


def test_mistakes_have_one_message(tmp_path, capsys):
    def told(directory, *words):
        code = main([str(directory), *words])
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("collect_results: ")
        return code, lines[0]

    (tmp_path / "empty").mkdir()
    assert told(tmp_path / "no") == (2, f"collect_results: {tmp_path}/no is not a directory; expected one with "
                                        "TABLE/SETTING/ROW/row.json below it")  # fmt: skip
    assert "has no row.json below it" in told(tmp_path / "empty")[1]
    row = make_row(tmp_path / "out")
    for content, message in {
        "{": "not valid JSON",
        "[]": "expected a JSON object",
        json.dumps({"table": "table1", "setting": "s", "row": " "}): "no text for row, title",
    }.items():
        (row / "row.json").write_text(content)
        code, line = told(tmp_path / "out")
        assert code == 2 and message in line and str(row / "row.json") in line
    make_row(tmp_path / "twice" / "a")
    make_row(tmp_path / "twice" / "b").parent.parent.rename(tmp_path / "twice" / "a" / "again")
    assert "are both row opd of table1, skywork-math" in told(tmp_path / "twice" / "a")[1]
    (tmp_path / "nameless" / "opd" / "seed-1").mkdir(parents=True)
    make_row(tmp_path / "nameless")
    assert "nameless/opd has runs but no row.json" in told(tmp_path / "nameless")[1]
    code, line = told(make_row(tmp_path / "good"), "--save", str(row / "row.json" / "page"))
    assert code == 1 and "row.json/page cannot be written" in line
