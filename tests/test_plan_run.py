"""The planning command: how phases follow each other, what fits, mistakes, and the table of the docs."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from megatron_tropd.cli import ConfigError
from tools import plan_run
from tools.planning import scenario, table
from tools.planning.generation import plan_generation
from tools.planning.hardware import GPUS, Efficiency
from tools.planning.memory import PHASES, kv_room, over, plan_memory
from tools.planning.report import RunPlan
from tools.planning.scenario import make_scenario

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--num-gpus", "8", "--hf-checkpoint", "qwen3-1.7b", "--teacher-hf-checkpoint", "qwen3-8b", "--bf16"]
SGLANG = [*SMALL, *["--rollout-engine", "sglang", "--rollout-num-engines", "8", "--sglang-mem-fraction-static", "0.3"]]
URLS = ["--rollout-engine-urls", "http://a:1", "http://b:1", "http://c:1", "http://d:1"]
APART = [*SMALL, "--rollout-engine", "sglang", *URLS, "--recompute-granularity", "full", "--use-distributed-optimizer"]


def _seconds(*words):
    return plan_run.plan([*APART, *words]).step


def test_phases_take_turns_where_they_share_gpus():
    step = plan_run.plan(SGLANG).step
    parts = (step.generate_s, step.score_s, step.train_s, step.push_s)
    assert step.step_s == pytest.approx(sum(parts)) and min(parts) > 0
    (pool,) = step.pools
    assert pool.gpus == 8 and step.busy(pool) == pytest.approx(1)
    lagged = plan_run.plan([*SGLANG, "--rollout-lag", "1"])
    assert lagged.step.step_s == step.step_s and not lagged.step.overlaps
    assert "--rollout-lag 1 saves nothing here" in plan_run.text(lagged)


def test_lag_1_takes_the_longer_of_writing_and_training():
    now, later = _seconds(), _seconds("--rollout-lag", "1")
    assert now.step_s == pytest.approx(now.generate_s + now.score_s + now.train_s + now.push_s)
    assert later.step_s == pytest.approx(max(later.generate_s, later.score_s + later.train_s) + later.push_s)
    assert later.step_s < now.step_s
    trainer, engines = later.pools
    assert later.busy(engines) == pytest.approx((later.generate_s + later.push_s) / later.step_s)
    assert later.busy(trainer) == pytest.approx((later.score_s + later.train_s + later.push_s) / later.step_s)
    slow = _seconds("--rollout-lag", "1", "--score-efficiency", "0.01")
    assert slow.score_s > slow.generate_s
    assert slow.step_s == pytest.approx(slow.score_s + slow.train_s + slow.push_s) and slow.busy(slow.pools[0]) > 0.999


def test_a_dedicated_teacher_scores_while_others_are_written():
    words = ["--teacher-placement", "dedicated", "--teacher-world-size", "4"]
    step = _seconds(*words)
    assert 0 < step.waits_for_scores_s < 0.2 * step.score_s
    assert step.step_s == pytest.approx(step.generate_s + step.waits_for_scores_s + step.train_s + step.push_s)
    slow = _seconds(*words, "--score-efficiency", "0.01")
    assert slow.waits_for_scores_s > 0.5 * slow.score_s  # it cannot keep up
    lagged = _seconds(*words, "--rollout-lag", "1")
    assert lagged.step_s == pytest.approx(lagged.generate_s + lagged.waits_for_scores_s + lagged.push_s)
    pools = {pool.name: pool.gpus for pool in step.pools}
    assert pools == {"trainer": 4, "teacher": 4, "engines": 4}


def test_placements_need_their_gpus():
    totals = {
        "colocated": (8 + 4, ()), "dedicated": (8 + 4, ("--teacher-world-size", "2")),
        "server": (8 + 4 + 2, ("--teacher-num-servers", "2")), "file": (8 + 4, ()),
    }  # fmt: skip
    weights = {}
    for placement, (total, more) in totals.items():
        plan = plan_run.plan([*APART, "--teacher-placement", placement, *more])
        assert plan.scenario.total_gpus == total, placement
        weights[placement] = {
            rank.who: sum(item.bytes for item in rank.items if item.name.endswith("weights") and "teacher" in item.name)
            for rank in plan.memory
        }
        assert (plan.step.score_s == 0) == (placement == "file")
    assert weights["colocated"]["student"] == weights["dedicated"]["teacher"] > 16e9
    assert weights["server"]["teacher's server"] == pytest.approx(weights["colocated"]["student"], rel=1e-3)
    assert weights["dedicated"]["student"] == weights["server"]["student"] == weights["file"]["student"] == 0


def test_offload_keeps_the_teacher_for_its_phase_only():
    plan = plan_run.plan([*SGLANG, "--teacher-offload"])
    (rank,) = plan.memory
    kept = plan_run.plan(SGLANG).memory[0]
    assert rank.of("score") == kept.of("score") and kept.of("train") - rank.of("train") > 16e9
    assert plan.step.score_s > plan_run.plan(SGLANG).step.score_s  # it moves


@pytest.mark.parametrize(
    ("flags", "item", "factor"),
    [
        ("--use-distributed-optimizer", "student: optimizer state", 8),
        ("--tensor-model-parallel-size 2", "student: optimizer state", 2),
        ("--context-parallel-size 2", "student: activations", 2),
        ("--context-parallel-size 4", "teacher: forward pass", 1),
        ("--teacher-tensor-model-parallel-size 4", "teacher: weights", 4),
        ("--teacher-pipeline-model-parallel-size 2", "teacher: weights", 2),
        (
            "--teacher-pipeline-model-parallel-size 2 --teacher-decoder-first-pipeline-num-layers 9",
            "teacher: weights",
            3.5,
        ),
        ("--max-tokens-per-microbatch 32768", "student: activations", 1 / 2),
        ("--logits-chunk-tokens 2048", "teacher: logits of a chunk", 4),
    ],
)
def test_flags_divide_what_they_say(flags, item, factor):
    before, after = (
        {i.name: i.bytes for i in plan_run.plan(words).memory[0].items} for words in (SGLANG, [*SGLANG, *flags.split()])
    )
    assert before[item] / after[item] == pytest.approx(factor, rel=0.03)


def test_stages_of_a_pipeline_are_planned_as_they_are_cut():
    """Uneven stages go at the pace of the largest; virtual ones wait less and hold more."""
    cut = ["--pipeline-model-parallel-size", "4", "--recompute-granularity", "full"]
    even, uneven, virtual = (
        plan_run.plan([*SGLANG, *cut, *more.split()])
        for more in ("", "--decoder-first-pipeline-num-layers 4", "--num-virtual-stages-per-pipeline-rank 7")
    )  # 28 layers: 7 in each stage; 4, 8, 8, 8; seven chunks of one layer
    weights = [
        {m.who: m for m in plan.memory}["student, stage 0, with a server"].items[0].bytes for plan in (even, uneven)
    ]
    assert weights[0] > weights[1]
    assert uneven.step.train_s / even.step.train_s == pytest.approx(8 / 7, rel=0.02)
    assert virtual.step.train_s < even.step.train_s

    def activations(plan):
        found = {m.who: {i.name: i.bytes for i in m.items} for m in plan.memory}
        return found["student, stage 0, with a server"]["student: activations"]

    # 4 micro-batches of 7 layers in flight; of chunks of one layer 2 * 3 + 6 * 4 + 1 = 31
    assert activations(virtual) / activations(even) == pytest.approx(31 / 28, rel=0.1)


def test_a_server_has_the_fraction_that_it_is_given():
    plan = plan_run.plan(SGLANG)
    sizes = {item.name: item.bytes for item in plan.memory[0].items}
    assert sizes["SGLang server: weights and KV cache"] == 0.3 * GPUS["h100"].memory
    one = 28 * 2 * 8 * 128 * 2  # docs/scaling.md
    assert kv_room(plan.scenario) == pytest.approx((0.3 * 80e9 - 2 * 1.7206e9) / one, rel=1e-3)
    small = plan_run.plan([*SGLANG, "--sglang-mem-fraction-static", "0.05"])
    assert "a server has room for" in plan_run.text(small) and "--sglang-mem-fraction-static" in plan_run.text(small)


def test_more_sequences_than_room_are_said():
    plan = plan_run.plan([*SGLANG, "--rollout-batch-size", "1024"])
    generation = plan.step.generation
    assert generation.batch < generation.sequences == 512
    assert "sequences in a step and writes" in plan_run.text(plan)
    assert plan_generation(plan.scenario).seconds == generation.seconds


def test_what_does_not_fit_is_named_with_the_flags_that_change_it(capsys):
    words = [*SMALL, "--gpu", "a100-40gb", "--max-response-length", "4096"]
    assert plan_run.main(words) == 1
    text = capsys.readouterr().out
    assert "Does not fit: student" in text and "--rollout-max-batch-size" in text
    together = next(line for line in text.splitlines() if "fits with" in line).split("fits with ")[1]
    fixed = plan_run.plan([*words, *together.split()])
    assert fixed.fits and over(plan_memory(fixed.scenario)) <= 0
    without = together.split()[2:] if together.startswith("--rollout-max-batch-size") else []
    assert not plan_run.plan([*words, *without]).fits


def test_json_has_the_numbers_of_the_text(capsys):
    words = [*SGLANG, "--use-distributed-optimizer", "--recompute-granularity", "full"]
    assert plan_run.main([*words, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    plan = plan_run.plan(words)
    assert value["fits"] and value["seconds"]["step"] == plan.step.step_s and value["changes"] == []
    (rank,) = value["memory"]
    assert set(rank["phases"]) == set(PHASES)
    for phase, total in rank["phases"].items():
        assert total == pytest.approx(sum(item["bytes"] for item in rank["items"] if phase in item["phases"]))
    assert f"Seconds of a step: {value['seconds']['step']:.1f}" in plan_run.text(plan)
    assert value["flops"]["train"] == pytest.approx(3 * value["flops"]["score"] / 4.5, rel=0.2)  # 1.7B and 8B


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--hf-checkpoint", "qwen3-1.7b"], ["--num-gpus is missing"]),
        (["--num-gpus", "8"], ["--hf-checkpoint is missing", "--teacher-hf-checkpoint is missing", "qwen3-1.7b"]),
        ([*SMALL, "--hf-checkpoint", "nothing"], ["--hf-checkpoint nothing is no directory with a config.json"]),
        ([*SMALL, "--gpu", "tpu"], ["invalid choice: 'tpu'", "h100"]),
        ([*SMALL, "--num-gpu", "8"], ["unknown flag --num-gpu"]),
        ([*SMALL, "--tensor-model-parallel-size", "3"], ["does not divide the 8 ranks"]),
        ([*SMALL, "--context-parallel-size", "3"], ["--context-parallel-size 3 does not divide the 8 ranks"]),
        (
            [*SMALL, "--teacher-tensor-model-parallel-size", "16", "--tensor-model-parallel-size", "5"],
            ["--teacher-tensor-model-parallel-size 16", "--tensor-model-parallel-size 5"],
        ),
        ([*SMALL, "--mean-response-length", "9000"], ["--mean-response-length 9000", "--max-response-length 8096"]),
        ([*SMALL, "--max-response-length", "20000"], ["do not fit --max-tokens-per-microbatch 16384"]),
        ([*SMALL, "--teacher-placement", "dedicated"], ["needs --teacher-world-size N"]),
        (
            [*SMALL, "--teacher-placement", "dedicated", "--teacher-world-size", "8"],
            ["--teacher-world-size 8 leaves no rank of --num-gpus 8"],
        ),
        ([*SMALL, "--teacher-world-size", "2"], ["--teacher-world-size 2 has no meaning"]),
        (
            [*SMALL, "--teacher-placement", "server", "--teacher-sglang-tp-size", "5"],
            ["--teacher-sglang-tp-size 5"],
        ),
        ([*SGLANG, "--rollout-num-engines", "9"], ["--rollout-num-engines 9", "do not fit the 8 GPUs"]),
        ([*SGLANG, "--sglang-mem-fraction-static", "much"], ["--sglang-mem-fraction-static much is not a number"]),
        ([*SMALL, "--student-world-size", "4"], ["--student-world-size 4", "leaves the student 8"]),
        ([*SGLANG, "--rollout-gpu-ids", "0", "one"], ["--rollout-gpu-ids one: expected numbers of GPUs"]),
        ([*SGLANG, "--sglang-start-timeout", "900"], ["--distributed-timeout-minutes 10", "--sglang-start-timeout 900"]),
        ([*SMALL, "--train-efficiency", "2"], ["--train-efficiency 2 must be above 0 and at most 1"]),
        ([*SMALL, "--gpu-tflops", "0"], ["--gpu-tflops 0 must be above 0"]),
        ([*SMALL, "--memory-reserve-gb", "90"], ["--memory-reserve-gb 90 must be from 0 to the GPU's 80"]),
        ([*SMALL, "--top-k", "0", "--objective", "nothing"], ["--top-k 0", "--objective 'nothing' is not known"]),
    ],
)  # fmt: skip
def test_mistakes_are_named(capsys, words, parts):
    assert plan_run.main(words) == 2
    said = capsys.readouterr()
    assert not said.out and all(part in said.err for part in parts), said.err


def test_servers_beyond_the_trainers_gpus_have_gpus_of_their_own():
    words = [*SGLANG, "--num-gpus", "4", "--rollout-num-engines", "4"]
    assert plan_run.plan(words).scenario.total_gpus == 4
    beyond = plan_run.plan([*words, "--rollout-gpu-ids", "4", "5", "6", "7", "--rollout-lag", "1"])
    assert beyond.scenario.total_gpus == 8 and beyond.step.overlaps
    by_number = plan_run.plan([*words, "--rollout-num-gpus-per-node", "4", "--rollout-lag", "1"])
    assert by_number.step == beyond.step and by_number.memory == beyond.memory
    unused = plan_run.plan([*SMALL, "--sglang-mem-fraction-static", "0.3"])
    assert "--rollout-engine embedded does not use --sglang-mem-fraction-static" in plan_run.text(unused)


def test_peaks_of_a_gpu_can_be_given():
    plain, other = (
        plan_run.plan([*SGLANG, *words])
        for words in ([], ["--gpu-tflops", "1978", "--gpu-memory-gb", "160", "--gpu-bandwidth-gbs", "6700"])
    )
    assert other.memory[0].room == 160e9 - 6e9
    assert other.step.score_s == pytest.approx(plain.step.score_s / 2, rel=0.01)
    assert plain.step.generate_s / 2 < other.step.generate_s < plain.step.generate_s


def test_an_example_and_a_directory(tmp_path, capsys):
    from tools.acceptance.shapes import TINY, TINY_TEACHER, write_hf_config

    student, teacher = write_hf_config(TINY, tmp_path / "s"), write_hf_config(TINY_TEACHER, tmp_path / "t")
    words = ["--config", str(ROOT / "examples" / "quickstart.yaml"), "--num-gpus", "2", "--gpu", "h100"]
    assert plan_run.main([*words, "--hf-checkpoint", str(student), "--teacher-hf-checkpoint", str(teacher)]) == 0
    text = capsys.readouterr().out
    assert "student    0.00 B parameters in fp32, TP2" in text and "colocated TP1 PP2" in text
    assert "64 rollouts" in text and "--bf16 is off" in text


def test_a_megatron_checkpoint_has_its_config(tmp_path):
    from tools.acceptance.shapes import TINY, write_hf_config

    folder = tmp_path / "iter_0000005"
    write_hf_config(TINY, folder / "hf")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    assert scenario.find_model("", "--hf-checkpoint", str(tmp_path)) == TINY
    with pytest.raises(ValueError, match="nowhere"):
        scenario.find_model("", "--hf-checkpoint", str(tmp_path / "nowhere"))


def test_methods_without_a_teacher_or_without_rollouts():
    alone = plan_run.plan([*SMALL, "--objective", "sft", "--num-gpus", "8"])
    assert alone.step.generate_s == alone.step.score_s == alone.step.push_s == 0 < alone.step.train_s
    three = plan_run.plan([*SGLANG, "--objective", "gopd"])
    assert {item.name for item in three.memory[0].items} >= {"reference: weights", "teacher: weights"}
    whole = plan_run.plan([*SGLANG, "--objective", "full_fkl"])
    assert whole.step.score_payload > 10 * plan_run.plan(SGLANG).step.score_payload
    assert "teacher's logits, rows and hidden states" in {item.name for item in whole.memory[0].items}


def test_efficiencies_have_flags():
    args = plan_run.parser().parse_args([])
    for name in plan_run.EFFICIENCIES:
        assert getattr(args, f"{name}_efficiency") == getattr(Efficiency(), name)
    half = Efficiency().train / 2
    plain, slow = plan_run.plan(SGLANG), plan_run.plan([*SGLANG, "--train-efficiency", str(half)])
    assert 1.8 < slow.step.train_s / plain.step.train_s <= 2 and slow.step.score_s == plain.step.score_s


def test_all_mistakes_come_together():
    with pytest.raises(ConfigError) as caught:
        plan_run.plan([*SMALL, "--mean-response-length", "0", "--lr", "-1", "--rollout-lag", "1", "--num-gpus", "0"])
    assert len(caught.value.errors) == 3


def test_the_documented_table_is_what_the_command_prints():
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for line in table.lines(plan_run.plan):
        assert line in text.splitlines(), line


def test_rows_of_the_table_fit_and_make_sense():
    for row in table.ROWS:
        plan = plan_run.plan(table.words_of(row))
        assert isinstance(plan, RunPlan) and plan.fits, row
        assert math.isfinite(plan.step.step_s) and all(0 < plan.step.busy(pool) <= 1.0001 for pool in plan.step.pools)
        assert make_scenario(plan.scenario.config, plan.scenario.machines) == plan.scenario


@pytest.mark.parametrize("name", ["one_node.sh", "two_nodes.sh"])
def test_the_launch_scripts_are_planned_to_fit(tmp_path, name):
    from tests.test_examples import LAUNCHERS, _command

    path = ROOT / "examples" / "h100" / name
    _, words = _command(path, tmp_path, STUDENT="Qwen/Qwen3-1.7B", TEACHER="Qwen/Qwen3-8B")
    plan = plan_run.plan([*words, "--num-gpus", str(LAUNCHERS[name])])
    assert plan.fits and plan.scenario.total_gpus == LAUNCHERS[name]
    assert [rank.ranks for rank in plan.memory] == ([8] if name == "one_node.sh" else [8, 8])


@pytest.mark.parametrize("name", ["README.md", "docs/scaling.md"])
def test_documented_commands_are_accepted(name, capsys):
    text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^python tools/plan_run\.py (--num-gpus.*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        assert plan_run.main(command.split()) in (0, 1), capsys.readouterr().err
