"""The miniature study: its statistics, its plan, its worlds and its page."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import yaml

from examples.miniature_study import report, run
from megatron_tropd.cli import parse
from tools.small_world import arithmetic, build, language, pretraining
from tools.study import claims, comparisons, plan, results, statistics, worlds
from tools.study.methods import METHODS
from tools.study.readme_table import BEGIN, END, with_table
from tools.study.statistics import Difference, Verdict

ROOT = Path(__file__).resolve().parent.parent
MADE_UP = ROOT / "tests/golden/miniature_study_made_up.jsonl"
COMMITTED = ROOT / "examples/miniature_study/results.jsonl"


# Statistics


def density(t, degrees):
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    return scale * (1 + t * t / degrees) ** (-(degrees + 1) / 2)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 30])
def test_quantile_is_where_the_density_has_its_area(degrees):
    """Oracle: the density of Student's distribution, integrated numerically."""
    quantile = statistics.t_quantile(0.975, degrees)
    grid = np.linspace(0, quantile, 20_001)
    area = np.trapezoid([density(t, degrees) for t in grid], grid)
    assert area == pytest.approx(0.475, abs=1e-6)


@pytest.mark.parametrize(("degrees", "printed"), [(1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228)])
def test_quantile_is_that_of_printed_tables(degrees, printed):
    assert statistics.t_quantile(0.975, degrees) == pytest.approx(printed, abs=5e-4)


def test_paired_difference_is_that_of_numpy():
    pairs = [(3.0, 1.0), (5.5, 2.5), (4.0, 3.5), (9.0, 2.0), (1.0, 2.0)]
    taken = np.subtract(*np.transpose(pairs))
    found = statistics.difference_of(pairs)
    assert found.mean == pytest.approx(taken.mean())
    assert found.half_width == pytest.approx(2.7764451 * taken.std(ddof=1) / math.sqrt(5))
    assert (found.seeds, found.above, found.below) == (5, 4, 1)


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([2.0, 3.0, 2.5], Verdict.HOLDS),
        ([-2.0, -3.0, -2.5], Verdict.OPPOSITE),
        ([10.0, 10.0, 10.0, 10.0, -0.1], Verdict.OPEN),  # the interval lies above 0, one seed does not
        ([1.0, 9.0, 2.0], Verdict.OPEN),  # every seed lies above 0, the interval does not
        ([0.0, 0.0, 0.0], Verdict.OPEN),
        ([5.0], Verdict.OPEN),
    ],
)
def test_verdict_needs_the_interval_and_every_seed(differences, verdict):
    found = statistics.difference_of([(value, 0.0) for value in differences])
    assert found.verdict is verdict
    if differences[-1] == -0.1:
        assert found.mean - found.half_width > 0


def difference(mean, half_width=1.0, seeds=3):
    above = seeds if mean > 0 else 0
    return Difference(mean=mean, half_width=half_width, seeds=seeds, above=above, below=seeds - above)


class Differences:
    """Stands for a table; difference by the second method of a pair."""

    def __init__(self, **by_other):
        self._by_other = by_other

    def difference(self, condition, first, second, quantity):
        return self._by_other.get(second)


@pytest.mark.parametrize(
    ("found", "verdict", "least"),
    [
        ({"a": difference(5.0), "b": difference(2.0)}, Verdict.HOLDS, "b"),
        ({"a": difference(5.0), "b": difference(0.5)}, Verdict.OPEN, "b"),
        ({"a": difference(-2.0), "b": difference(0.5, half_width=9.0)}, Verdict.OPPOSITE, "a"),
        ({"a": difference(5.0)}, Verdict.NOT_RUN, "a"),
        ({"a": difference(-5.0)}, Verdict.OPPOSITE, "a"),
        ({}, Verdict.NOT_RUN, None),
    ],
)
def test_claim_of_two_comparisons(found, verdict, least):
    claim = claims.Claim(text="", source="", pairs=(("x", "a"), ("x", "b")))
    judged = claims.judge(claim, Differences(**found), comparisons.Condition(world="B4"), "greedy")
    assert judged.verdict is verdict
    assert judged.least_pair == (None if least is None else ("x", least))


# Plan


def test_plan_has_every_row_of_the_papers_tables_with_every_seed_and_nothing_twice():
    cells = plan.full_plan()
    assert len(set(cells)) == len(cells)
    of_paper = {"opd", "fkl", "jsd", "entropy_opd", "clip_outlier", "mask_outlier", "fkl_outlier", "tropd",
                "tropd_mask", "tropd_clip"}  # fmt: skip
    for world, seed in itertools.product(("B4", "H4", "H4f"), range(5)):
        main = {c.method for c in cells if (c.world, c.seed, c.lr, c.steps) == (world, seed, 1e-3, 100)}
        assert main == set(METHODS) >= of_paper | {"tropd_floor", "clip_fkl", "tropd_official", "fkl_reward"}
    assert {c.world for c in plan.full_plan(1, warning_world=True)} - {c.world for c in cells} == {"U"}
    assert set(plan.subset_plan()) < set(cells)


def test_claims_are_about_runs_of_the_plan():
    planned = {(comparisons.Condition(world=c.world, lr=c.lr, steps=c.steps), c.method) for c in plan.full_plan(1)}
    everywhere = [*claims.ACCURACY_CLAIMS, *claims.OUR_CLAIMS, *(claim for _, claim in claims.CURVE_CLAIMS)]
    asked = [(condition, claim) for condition in claims.MAIN for claim in everywhere] + list(claims.OTHER_CLAIMS)
    for condition, claim in asked:
        for method in {*itertools.chain(*claim.pairs)} - {comparisons.STUDENT}:
            assert (condition, method) in planned, (condition, claim.text)


def configuration(cell):
    here = Path("made")
    files = plan.CellFiles(
        student=here / "s", teacher=here / "t", train=here / "a.jsonl", held_out=here / "b.jsonl", token_cache=here
    )
    return parse(plan.training_flags(cell, files, here / "run"))


def test_methods_differ_in_their_own_settings_alone():
    sections = {}
    for cell in plan.full_plan(1):
        config = configuration(cell)
        assert (config.training.lr, config.training.train_iters) == (cell.lr, cell.steps)
        assert config.objective.objective == METHODS[cell.method].flags["objective"]
        assert (config.training.adam_beta1, config.training.adam_beta2) == (0.9, 0.999)
        assert config.method.top_k == 4 and config.method.outlier_threshold == config.method.reward_floor == -2.0
        assert config.guidance.mode == (
            "ratio" if cell.method.startswith("tropd") and cell.method != "tropd_floor" else "none"
        )
        shared = (config.training, config.rollout, config.evaluation, config.model, config.checkpoint)
        assert sections.setdefault((cell.lr, cell.steps), shared) == shared


def test_methods_are_those_of_the_papers_recipes():
    rows = yaml.safe_load((ROOT / "examples/paper/rows.yaml").read_text())["rows"]
    for name in set(METHODS) - {"tropd_floor", "clip_fkl"}:
        assert {flag: str(value) for flag, value in rows[name]["flags"].items()} == METHODS[name].flags, name


def test_settings_tell_whatever_a_cell_is_made_from(monkeypatch):
    cell = plan.Cell(seed=0, world="B4", steps=100, lr=1e-3, method="opd")
    others = [replace(cell, **change) for change in
              ({"seed": 1}, {"world": "H4"}, {"steps": 200}, {"lr": 3e-3}, {"method": "fkl"})]  # fmt: skip
    before = [worlds.settings_of(one) for one in (cell, *others)]
    assert len(set(before)) == 6
    monkeypatch.setattr(plan, "SHARED_FLAGS", {**plan.SHARED_FLAGS, "top-k": "5"})
    monkeypatch.setattr(worlds, "SHARED_FLAGS", plan.SHARED_FLAGS)
    assert worlds.settings_of(cell) not in before


def test_command_line_selects_and_refuses(capsys):
    words = ["--seeds", "2", "--worlds", "B4", "--methods", "opd", "fkl", "--lr", "1e-3", "--steps", "100"]
    cells = run.plan_of(run.arguments(words))
    assert {(c.world, c.method, c.seed) for c in cells} == set(itertools.product(["B4"], ["opd", "fkl"], [0, 1]))
    assert {c.world for c in run.plan_of(run.arguments(["--worlds", "U"]))} == {"U"}
    assert run.main(["--worlds", "H4", "--steps", "200"]) == 2
    assert "no run of the study has these" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        run.main(["--seeds", "0"])
    assert stopped.value.code == 2 and "--seeds 0: expected at least 1" in capsys.readouterr().err


# Worlds


def test_lessons_of_the_quickstart_are_unchanged():
    """Their digest, as it was before lessons had a style: the quickstart's numbers in the README rest on them."""
    rng = Random("0 teacher lessons")
    problems = arithmetic.draw_problems(rng, 500)
    lessons = build.write_lessons(rng, problems, pretraining.TEACHER.style)
    text = "".join(
        f"{problem.prompt}|{problem.answer}|{list(lesson.token_ids)}|{list(map(int, lesson.taught))}\n"
        for problem, lesson in zip(problems, lessons, strict=True)
    )
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "4795a4d9e06f3938a7841af47dc2f76419503c1a2813110d4dd230deae85943d"


def lessons_of(recipe, count=300):
    rng = Random(f"0 {recipe.name} lessons")
    problems = arithmetic.draw_problems(rng, count)
    return build.write_lessons(rng, problems, recipe.style)


@pytest.mark.parametrize(("role", "share", "taught"), [("teacher", 0.15, False), ("student", 0.4, True)])
def test_worlds_with_fillers_differ_in_fillers_alone(role, share, taught):
    fillers = {language.WORD_ID[word] for word in language.FILLERS}
    plain, filled = (lessons_of(getattr(worlds.WORLDS[world], role)) for world in ("B4", "H4"))
    found = 0
    for without, lesson in zip(plain, filled, strict=True):
        pairs = list(zip(lesson.token_ids, lesson.taught, strict=True))
        kept = [pair for pair in pairs if pair[0] not in fillers]
        assert kept == list(zip(without.token_ids, without.taught, strict=True))
        assert all(target == taught for token, target in pairs if token in fillers)
        assert len(pairs) <= arithmetic.MAX_RESPONSE_LEN
        found += len(pairs) - len(kept)
    places = len(plain) * arithmetic.NUM_STEPS
    assert abs(found - share * places) < 4 * math.sqrt(places * share * (1 - share))


def test_worlds_share_networks():
    cells = [plan.Cell(seed=0, world=world, steps=100, lr=1e-3, method="opd") for world in ("B4", "H4", "H4f")]
    assert len(worlds.networks(cells)) == 4
    b4, h4, h4f = (worlds.networks_of(cell.world, 0) for cell in cells)
    assert h4f == (b4[0], h4[1])
    assert {network.name for network in b4} & {network.name for network in worlds.networks_of("B4", 1)} == set()


# Results and their page


def test_results_survive_a_write_that_was_cut(tmp_path):
    path = tmp_path / "results.jsonl"
    first, second = results.read(MADE_UP)[:2]
    results.append(path, first)
    whole = path.read_bytes()
    results.append(path, second)
    path.write_bytes(path.read_bytes()[:-30])
    assert results.repair(path) and path.read_bytes() == whole
    assert not results.repair(path)
    results.append(path, second)
    assert results.read(path) == [first, second]


@pytest.mark.parametrize(
    ("lines", "message"),
    [(["{}"], "line 1 is not a result"), (["no JSON"], "line 1 is not a result"), ([0, 0], "is there twice")],
)
def test_unusable_results_are_refused(tmp_path, capsys, lines, message):
    good = MADE_UP.read_text().splitlines()
    path = tmp_path / "results.jsonl"
    path.write_text("".join((good[line] if line == 0 else line) + "\n" for line in lines))
    assert report.main(["--results", str(path), "--page", str(tmp_path / "p.md"), "--images", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_results_of_other_settings_are_refused(tmp_path):
    made_up = results.read(MADE_UP)
    with pytest.raises(results.ResultsError, match=r"B4-opd-lr0\.001-100steps-seed0 was made with other settings"):
        results.finished(made_up, worlds.settings_of, tmp_path)
    right = [replace(one, settings=worlds.settings_of(one.cell)) for one in made_up]
    assert results.finished(right, worlds.settings_of, tmp_path) == {one.cell for one in made_up}


def written(source, place):
    assert report.main(["--results", str(source), "--page", str(place / "docs/page.md"),
                        "--images", str(place / "docs/images")]) == 0  # fmt: skip
    return {path.name: path.read_bytes() for path in sorted(place.rglob("*.*"))}


def test_page_is_remade_byte_for_byte(tmp_path):
    """The committed page of made-up results, which ``report.py --results ... --page ...`` writes when its text changes; two
    writings also agree in their figures."""
    once, twice = written(MADE_UP, tmp_path / "a"), written(MADE_UP, tmp_path / "b")
    assert once == twice and len(once) == 7
    assert once["page.md"].decode() == MADE_UP.with_suffix(".md").read_text()


def test_page_does_not_depend_on_the_order_of_the_runs(tmp_path):
    shuffled = tmp_path / "results.jsonl"
    lines = MADE_UP.read_text().splitlines(keepends=True)
    Random(0).shuffle(lines)
    shuffled.write_text("".join(lines))
    assert written(shuffled, tmp_path / "a")["page.md"] == MADE_UP.with_suffix(".md").read_bytes()


def test_committed_page_is_that_of_the_committed_results(tmp_path):
    made = written(COMMITTED, tmp_path)
    assert made["page.md"].decode() == (ROOT / "docs/miniature_study.md").read_text()


def test_what_holds_for_every_seed_of_the_committed_results():
    runs = {run.cell: run for run in results.read(COMMITTED)}
    assert set(runs) == set(plan.full_plan())
    for condition, seed in itertools.product(claims.MAIN, range(5)):
        cell = plan.Cell(world=condition.world, method="opd", lr=condition.lr, steps=condition.steps, seed=seed)
        run = {name: runs[replace(cell, method=name)] for name in METHODS}
        norm = {name: math.fsum(one.grad_norm) / len(one.grad_norm) for name, one in run.items()}
        assert all(run["fkl_reward"].after[d] < run["opd"].before[d] for d in results.DECODINGS)
        assert norm["opd"] > norm["clip_outlier"] > norm["mask_outlier"] and norm["opd"] > norm["tropd"]
        assert run["tropd"].entropy[-1] > run["opd"].entropy[-1]
        assert run["fkl_outlier"].after["greedy"] > run["fkl_outlier_reward"].after["greedy"]
        assert run["mask_outlier"].after["temperature_1"] < run["opd"].after["temperature_1"]


def test_readme_shows_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert with_table(text, results.read(COMMITTED)) == text


def test_readme_keeps_what_is_around_its_table(tmp_path, capsys):
    words = ["--results", str(MADE_UP), "--page", str(tmp_path / "p.md"), "--images", str(tmp_path)]
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert report.main([*words, "--readme", str(readme)]) == 0
    first, *table, last = readme.read_text().splitlines()
    assert (first, table[0], table[-1], last) == ("before", BEGIN, END, "after") and "old" not in table
    assert table[1].startswith("|  | B4, top-p 0.7 | B4, greedy | B4, temperature 1 | H4, top-p 0.7 |")
    assert "| OPD (`opd`) | 54.0 (1.5) | 57.0 (1.5) | 43.0 (0.6) | 51.0 | 48.0 (2.0) |" in table
    for text in ("no marks\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n{END}\n"):
        readme.write_text(text)
        assert report.main([*words, "--readme", str(readme)]) == 2 and readme.read_text() == text
        assert "expected one line" in capsys.readouterr().err


def test_page_has_the_numbers_of_its_results():
    """One cell of the tables, from the lines themselves."""
    runs = {(r.method, r.seed): r for r in results.read(MADE_UP) if (r.world, r.lr) == ("B4", 1e-3)}
    taken = [100 * (runs["fkl_reward", s].after["greedy"] - runs["opd", s].after["greedy"]) for s in range(3)]
    half = 4.3026527 * np.std(taken, ddof=1) / math.sqrt(3)
    mean = np.mean(taken)
    row = next(
        line for line in MADE_UP.with_suffix(".md").read_text().splitlines() if line.startswith("| `fkl_reward`")
    )
    assert f"| {mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}], 0/3 |" in row


def test_a_line_of_the_results_is_small():
    """290 lines of 200 steps would still be far below 2 MB."""
    line = json.dumps(dataclasses.asdict(results.read(MADE_UP)[0]))
    assert 290 * len(line) * 2 < 500_000
