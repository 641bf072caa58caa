"""Examples and documented code: what a reader copies must be accepted by the code of today."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_tropd.cli import parse
from megatron_tropd.models.hf_config import architecture_from_hf_config
from megatron_tropd.objectives import methods
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.types import StepContext, TokenStats
from tests.dense import make_streams

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "examples").rglob("*.sh"))
YAMLS = sorted(path for path in (ROOT / "examples").rglob("*.yaml") if path.name != "rows.yaml")
"""Files for --config; rows.yaml of examples/paper is read by tools/paper (tests/test_paper_recipes.py)."""
LAUNCHERS = {"one_node.sh": 8, "two_nodes.sh": 16}
ARRAYS = ("MODEL", "PARALLEL", "DATA", "ROLLOUT", "OBJECTIVE", "OPTIMIZER", "CHECKPOINT")
PLACES = {
    "STUDENT": "/s",
    "TEACHER": "/t",
    "PROMPTS": "/p.jsonl",
    "RUN_DIR": "/r",
    "NODE_RANK": "0",
    "MASTER_ADDR": "n0",
}

_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
          "max_position_embeddings": 40960}  # fmt: skip
STUDENT = {**_QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
TEACHER = {
    **_QWEN3,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
}


def _id(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", YAMLS, ids=_id)
def test_yaml_keys_are_flags(path):
    parse(["--config", str(path)])


@pytest.mark.parametrize("path", SCRIPTS, ids=_id)
def test_scripts_are_bash(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


def _command(path, tmp_path, *more, **environment):
    """The words that ``path`` hands to torchrun, caught by one that only writes them down."""
    stub, caught = tmp_path / "torchrun", tmp_path / "words"
    stub.write_text(f'#!/usr/bin/env bash\nprintf "%s\\0" "$@" > {caught}\n')
    stub.chmod(0o755)
    paths = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["bash", str(path), *more], check=True, env={"PATH": paths, **PLACES, **environment}, timeout=60)
    words = caught.read_text().split("\0")[:-1]
    module = words.index("-m")
    assert words[module + 1] == "megatron_tropd.train"
    return words[:module], words[module + 2 :]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launch_scripts_pass_flags_the_parser_knows(name, tmp_path):
    path = ROOT / "examples" / "h100" / name
    launcher, argv = _command(path, tmp_path, "--train-iters", "3", EVAL_DATA="/e.jsonl")
    config = parse(argv)
    assert config.training.train_iters == 3, "words after the script come last, so that they win"
    assert config.evaluation.eval_data == ["/e.jsonl"] and config.logging.run_dir == "/r"
    nodes = int(launcher[launcher.index("--nnodes") + 1]) if "--nnodes" in launcher else 1
    world = nodes * int(launcher[launcher.index("--nproc-per-node") + 1])
    assert world == LAUNCHERS[name]
    text = path.read_text() + (path.parent / "qwen3_recipe.sh").read_text()
    assert all(f"{array}_ARGS=(" in text for array in ARRAYS)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launch_scripts_fit_their_models_and_the_paper(name, tmp_path):
    config = parse(_command(ROOT / "examples" / "h100" / name, tmp_path)[1])
    parallel, teacher = config.parallel, config.teacher
    for hf, tp, pp in (
        (STUDENT, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size),
        (TEACHER, teacher.teacher_tensor_model_parallel_size, teacher.teacher_pipeline_model_parallel_size),
    ):
        arch = architecture_from_hf_config(hf)
        assert not arch.check_layout(tp, pp)
        assert ParallelLayout.for_world(LAUNCHERS[name], tp, pp).dp >= 1
        longest = config.data.max_prompt_length + config.data.max_response_length
        assert longest <= min(arch.max_position_embeddings, config.training.max_tokens_per_microbatch)
    training, rollout = config.training, config.rollout
    assert (training.train_iters, training.lr, training.lr_decay_style) == (200, 5e-6, "constant")
    assert (training.adam_beta1, training.adam_beta2, training.weight_decay, training.clip_grad) == (0.9, 0.999, 0.1, 1)
    assert (rollout.rollout_batch_size, rollout.n_samples_per_prompt, config.method.top_k) == (128, 4, 64)
    assert (config.guidance.mode, config.guidance.schedule, config.guidance.steps) == ("ratio", "half-cosine", 200)
    assert (config.guidance.beta, config.data.max_response_length) == (0.001, 8096)


_FLAG = r"(?<![\w-])--[a-z][a-z0-9-]*"
COMMANDS = {  # what a command line of examples/paper/README.md runs -> files that define its flags, besides the trainer's
    "train.sh": ["examples/paper/common.sh"],
    "row.sbatch": ["examples/paper/common.sh", "examples/paper/row.sbatch"],
    "run_table.sh": ["tools/paper_table.py"],
    "prepare_prompts.py": ["tools/prompt_preparation/flags.py"],
    "generate": ["megatron_tropd/generation/flags.py"],
    "collect_results.py": ["tools/collect_results.py"],
    "plan_run.py": ["tools/plan_run.py"],
}


def test_commands_of_the_papers_readme_have_flags_that_exist():
    text = (ROOT / "examples" / "paper" / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [re.sub(r'\s# .*|"[^"]*"', "", line).strip() for line in blocks.splitlines()]  # comments, words for others
    seen = set()
    for line in filter(None, lines):
        name = next((name for name in COMMANDS if re.search(rf"\b{re.escape(name)}\b", line)), "")
        assert name or line.startswith("export "), line
        seen.add(name)
        known = {flag for path in COMMANDS.get(name, ()) for flag in re.findall(_FLAG, (ROOT / path).read_text())}
        known |= {f"--{name}" for name in (ROOT / "tests" / "golden" / "flags.txt").read_text().split()}
        assert set(re.findall(_FLAG, line)) <= known, line
    assert seen == {"", *COMMANDS}


GOLDEN = json.loads((ROOT / "tests" / "golden" / "golden.json").read_text())


@pytest.fixture(scope="module")
def documented(tmp_path_factory):
    """The file of the "Add a method" example in docs/objectives.md, as a module."""
    text = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(# megatron_tropd/objectives/clipped_reward\.py\n.*?)```", text, re.DOTALL)
    path = tmp_path_factory.mktemp("docs") / "clipped_reward.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("clipped_reward", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["clipped_reward"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["clipped_reward"]


@pytest.mark.parametrize("case", sorted(GOLDEN["cases"]))
def test_the_documented_method_equals_golden(documented, monkeypatch, case):
    row = methods.Method(make=methods.rule(lambda s: documented.ClippedReward(tau=s.outlier_threshold)))
    monkeypatch.setitem(methods.METHODS, "clip", row)
    golden = GOLDEN["cases"][case]
    sampled, tau = golden["meta"]["sampled"], golden["meta"]["tau"]
    logits = torch.tensor([golden["student_logits"]], dtype=torch.float64, requires_grad=True)
    log_q = torch.tensor([golden["teacher_logits"]], dtype=torch.float64).log_softmax(-1)
    blank, _ = make_streams(num_tokens=1, vocab_size=5, top_k=2, regions=[3])
    tokens = replace(blank, label_T=torch.tensor([sampled]), teacher_logprob_T=log_q[:, sampled])
    stats = TokenStats(logprob_T=logits.log_softmax(-1)[:, sampled])
    objective = methods.make_objective("clip", methods.ObjectiveSettings(outlier_threshold=tau))
    loss = objective(stats, tokens, StepContext()).token_loss_T.sum()
    expected = golden["losses"]["clip_outlier"]
    assert loss.item() == pytest.approx(expected["loss"], abs=1e-10)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad[0], torch.tensor(expected["grad"], dtype=torch.float64), atol=1e-10, rtol=1e-10)
