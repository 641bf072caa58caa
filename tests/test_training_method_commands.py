"""Supervised finetuning and GRPO as commands: from flags to an exported student, with no teacher anywhere."""

from __future__ import annotations

import json

import pytest

from tests.tiny_run import flags, make_world
from tests.torchrun_jobs import output_of

pytestmark = pytest.mark.slow

COMMANDS = {
    "sft": {"objective": "sft", "tensor_model_parallel_size": 2, "eval_prompts": 2, "eval_interval": 1},
    "grpo": {
        "objective": "grpo", "num_minibatches": 2, "n_samples_per_prompt": 3, "eval_data": None,
        "reward_function": "tests.reward_functions:third_of_length",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_trains_without_a_teacher(tmp_path, name):
    world = make_world(tmp_path / "world")
    changes = {"teacher_hf_checkpoint": None, "train_iters": 2, "eval_data": world / "eval.jsonl", **COMMANDS[name]}
    argv = flags(world, tmp_path / "run", **changes)
    text = output_of(argv, tmp_path)
    assert text.endswith("torchrun exited with 0"), text[-3000:]
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "step"]
    assert [step["step"] for step in steps] == [1, 2] and all(step["verdict"] == "stepped" for step in steps)
    assert (tmp_path / "run/hf_export/model.safetensors").is_file()
    if name == "sft":
        assert steps[0]["tokens"]["on_policy"] == 0 and "tropd/guidance_nll" in steps[0]["metrics"]
        assert sorted({record["step"] for record in records if record["kind"] == "eval"}) == [0, 1, 2]
        assert steps[0]["seconds"].get("generate", 0) < 1
    else:
        assert "reward/mean" in steps[0]["metrics"] and [step["weight_version"] for step in steps] == [2, 4]
