"""examples/paper: every setting and row is what the paper says, is stored, and would start as a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_tropd.cli import parse
from megatron_tropd.config import TrainConfig
from megatron_tropd.models.hf_config import architecture_from_hf_config
from megatron_tropd.objectives.methods import METHODS
from megatron_tropd.objectives.settings import ObjectiveSettings
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.plain_yaml import read_plain_yaml
from megatron_tropd.setup.run_spec import make_run_spec
from tests.tiny_run import make_world
from tools import plan_run
from tools.model_sizes import config_of
from tools.paper.recipes import PAPER, read_tables
from tools.paper.resolved import configuration, methods_of, resolved_flags
from tools.results.paper_tables import TABLES as PRINTED

GOLDEN = Path(__file__).resolve().parent / "golden" / "paper"
TABLES = read_tables()
ON_POLICY = [name for name, setting in TABLES.settings.items() if setting.benchmarks]
STEPS = [name for name, setting in TABLES.settings.items() if not setting.benchmarks]
RECIPES = [(name, row) for name in TABLES.settings for row in methods_of(TABLES, name)]
SCRIPT = "reported of the authors' script"
M2RL = "M2RL's script, to which Appendix A refers"
OURS = "chosen here, the paper is silent"

PAPER_VALUES = {
    "train-iters": (200, "section 5.1"),
    "lr": (5e-6, "section 5.1"),
    "lr-decay-style": ("constant", "section 5.1: a fixed learning rate"),
    "rollout-batch-size": (128, "section 5.1"),
    "n-samples-per-prompt": (4, "section 5.1"),
    "max-response-length": (8096, "section 5.1"),
    "top-k": (64, "section 5.1"),
    "guidance-beta": (0.001, "section 5.1"),
    "guidance-schedule": ("half-cosine", "section 4.3: a cosine; its form is reported of the authors' script"),
    "guidance-steps": (200, "section 4.3: to zero by the end of training"),
    "jsd-beta": (0.5, "section 4.1"),
    "entropy-share": (0.2, "section 4.1"),
    "lr-warmup-iters": (0, SCRIPT),
    "weight-decay": (0.1, SCRIPT),
    "clip-grad": (1.0, SCRIPT),
    "adam-beta1": (0.9, "veRL's default"),
    "adam-beta2": (0.999, "veRL's default"),
    "num-minibatches": (1, OURS),
    "rollout-lag": (0, OURS),
    "importance-correction": ("auto", OURS),
    "outlier-threshold": (-1.72, "REOPOLD's bound at its lambda; the paper gives no tau"),
    "reopold-lambda": (0.3, "REOPOLD"),
    "outlier-coef": (1.0, "Eq. 9"),
    "teacher-entropy-threshold": (0.8, "EOPD"),
}
"""Flag -> its value in every row of every table, and where that is from."""
SFT_VALUES = {
    "lr": (5e-5, "Appendix A"),
    "weight-decay": (0.1, "Appendix A"),
    "rollout-batch-size": (512, "Appendix A"),
    "train-iters": (55156, f"two epochs of 14.12 million samples: {M2RL}"),
    "lr-warmup-iters": (5516, "Appendix A: a tenth of the steps"),
    "lr-decay-style": ("cosine", M2RL),
    "min-lr": (5e-6, M2RL),
    "adam-beta1": (0.9, M2RL),
    "adam-beta2": (0.95, M2RL),
    "objective": ("sft", "Appendix A"),
}
GRPO_VALUES = {
    "n-samples-per-prompt": (16, "Appendix A"),
    "rollout-batch-size": (128, "Appendix A"),
    "num-minibatches": (1, "Appendix A: an update for 2048 rollouts"),
    "max-response-length": (32768, "Appendix A"),
    "importance-correction": ("icepop", "Appendix A: masked importance sampling"),
    "icepop-low": (0.5, "IcePop's bounds in public code"),
    "icepop-high": (5.0, "IcePop's bounds in public code"),
    "lr": (2e-6, M2RL),
    "lr-decay-style": ("constant", M2RL),
    "weight-decay": (0.1, M2RL),
    "adam-beta2": (0.98, M2RL),
    "ppo-clip": (0.2, M2RL),
    "ppo-clip-high": (0.28, M2RL),
    "grpo-kl-coef": (0.0, M2RL),
    "train-iters": (400, M2RL),
    "advantage-std": (True, M2RL),
    "grpo-denominator": ("samples", M2RL),
    "objective": ("grpo", "Appendix A"),
}
VALUES = {
    **dict.fromkeys(ON_POLICY, PAPER_VALUES),
    "sft-student": SFT_VALUES,
    "sft-teacher": SFT_VALUES,
    "grpo-teacher": GRPO_VALUES,
}
HUB = {
    "skywork-math": ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "Skywork/Skywork-OR1-Math-7B"),
    "skywork-three-domains": ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "Skywork/Skywork-OR1-7B"),
    "sft-student": ("Qwen/Qwen3-1.7B-Base", ""),
    "sft-teacher": ("Qwen/Qwen3-4B-Base", ""),
}
"""Models that the paper names and that are public."""
SIZES = {
    "skywork-math": ("qwen2.5-1.5b", "qwen2.5-7b"),
    "skywork-three-domains": ("qwen2.5-1.5b", "qwen2.5-7b"),
    "qwen3": ("qwen3-1.7b", "qwen3-4b"),
    "sft-student": ("qwen3-1.7b", ""),
    "sft-teacher": ("qwen3-4b", ""),
    "grpo-teacher": ("qwen3-4b", ""),
}


@pytest.mark.parametrize(("setting", "row"), RECIPES)
def test_no_flag_moves_a_value_of_the_paper(setting, row):
    flags = resolved_flags(TABLES, setting, row)
    moved = [
        f"--{flag} is {flags[flag]} in {setting} {row}; the paper's runs have {value} ({source})"
        for flag, (value, source) in VALUES[setting].items()
        if flags[flag] != value
    ]
    assert not moved, "\n".join(moved)
    student, teacher = HUB.get(setting, (flags["hf-checkpoint"], flags["teacher-hf-checkpoint"]))
    assert (flags["hf-checkpoint"], flags["teacher-hf-checkpoint"]) == (student, teacher)


def test_no_row_changes_what_all_rows_share():
    """A row's own flags are those of its method: the comparison is fair."""
    shared = set(PAPER_VALUES) - {"importance-correction", "outlier-threshold"}
    for row in TABLES.rows.values():
        assert not shared & set(row.flags), f"row {row.name} of rows.yaml"


@pytest.mark.parametrize(("setting", "row"), RECIPES)
def test_all_flags_are_as_stored(setting, row):
    """A default that changes shows here.  New flags are not compared until they are stored."""
    stored = yaml.safe_load((GOLDEN / f"{setting}.yaml").read_text())
    rows = stored.pop("rows", {})
    flags = resolved_flags(TABLES, setting, row)
    expected = {**stored, **rows.get(row, {})}
    changed = [
        f"--{name}: {flags.get(name)}, stored {value}" for name, value in expected.items() if flags.get(name) != value
    ]
    assert not changed, f"{setting} {row}, tests/golden/paper: {'; '.join(changed)}"
    assert not rows or {*rows} == {*methods_of(TABLES, setting)[1:]}, "run tools/paper_recipe.py --resolved"


def test_every_method_of_the_paper_is_a_row_of_a_table():
    used = {row.flags["objective"] for row in TABLES.rows.values() if row.flags}
    of_the_paper = {name for name, method in METHODS.items() if "TrOPD" in method.source}
    assert of_the_paper - {"tropd_paper", "topd"} <= used  # another name of tropd; not of this paper
    printed = {place.row.name for place in TABLES.printed}
    for row in TABLES.rows.values():
        assert (row.name in printed) != bool(row.reading_of), row.name
        assert not row.reading_of or (row.reading_of in printed and row.note)
        assert bool(row.flags) != bool(row.evaluates)


@pytest.mark.parametrize(
    ("table", "groups"),
    [
        ("table1", {"skywork-math": 9}), ("table3", {"skywork-math": 8, "skywork-three-domains": 5}),
        ("table4", {"qwen3": 7}), ("table5", {"skywork-math": 9}), ("table6", {"skywork-math": 5}),
    ],
)  # fmt: skip
def test_tables_have_as_many_rows_as_are_printed(table, groups):
    """Untrained models included; the student's row of Table 3 stands above both of its halves."""
    lines = TABLES.of(table)
    assert {name: sum(line.setting.name == name for line in lines) for name in groups} == groups
    assert len(lines) == sum(groups.values())
    more = TABLES.of(table, readings=True)
    assert [line for line in more if not line.row.reading_of] == lines and len(more) > len(lines)


def test_rows_are_those_whose_results_are_printed():
    """Names and titles are understood by the tables of the results."""
    for place in TABLES.printed:
        by_title = PRINTED[place.table].group(place.setting.name).row(place.title)
        assert by_title is not None and by_title is PRINTED[place.table].group(place.setting.name).row(
            place.row.name, place.title
        ), place


def test_settings_differ_in_models_and_memory_only():
    files = {name: read_plain_yaml(TABLES.settings[name].file) for name in ON_POLICY}
    first = files[ON_POLICY[0]]
    for name, flags in files.items():
        assert {*flags} == {*first}
        changed = {flag for flag, value in flags.items() if value != first[flag]}
        assert changed <= {"hf-checkpoint", "teacher-hf-checkpoint", "sglang-mem-fraction-static"}, name


@pytest.mark.parametrize("setting", TABLES.settings)
def test_settings_fit_their_machines(setting):
    """Layouts of both models on one node and on two, lengths, and memory as tools/plan_run.py counts it."""
    config = configuration(TABLES, setting, methods_of(TABLES, setting)[0])
    student, teacher = SIZES[setting]
    parallel, other = config.parallel, config.teacher
    cuts = [(student, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)]
    if teacher:
        cuts.append((teacher, other.teacher_tensor_model_parallel_size, other.teacher_pipeline_model_parallel_size))
    for model, tp, pp in cuts:
        assert not architecture_from_hf_config(config_of(model)).check_layout(tp, pp)
        assert all(ParallelLayout.for_world(world, tp, pp).dp >= 1 for world in (8, 16))
    longest = config.data.max_prompt_length + config.data.max_response_length
    assert longest <= config.training.max_tokens_per_microbatch
    models = ["--hf-checkpoint", student, *(["--teacher-hf-checkpoint", teacher] if teacher else [])]
    plan = plan_run.plan(["--num-gpus", "8", "--config", str(TABLES.settings[setting].file), *models])
    assert plan.fits, plan_run.text(plan)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_smoke_runs_keep_the_flags_of_methods():
    replaced = {*read_plain_yaml(PAPER / "smoke.yaml")}
    of_methods = {name.replace("_", "-") for name in ObjectiveSettings.__dataclass_fields__} | {"objective", "guidance"}
    assert replaced & of_methods == {"top-k"}, "the vocabulary of the small world is smaller than 64"
    assert not replaced & {"lr", "weight-decay", "clip-grad", "adam-beta1", "adam-beta2", "lr-decay-style"}


@pytest.mark.parametrize(("setting", "row"), RECIPES)
def test_smoke_runs_would_start(world, tmp_path, setting, row):
    """All checks of a run before its first process group, for every row."""
    config = configuration(TABLES, setting, row, world, "--run-dir", str(tmp_path / "run"))
    spec = make_run_spec(config, world_size=2)
    assert spec.config.objective.objective == (
        TABLES.rows[row].flags["objective"] if row else config.objective.objective
    )
    assert not [warning for warning in spec.warnings if "does not use" in warning and "--objective" in warning]


def test_recipes_are_files_that_others_can_read():
    for setting in TABLES.settings:
        assert isinstance(parse(["--config", str(TABLES.settings[setting].file)]), TrainConfig)
