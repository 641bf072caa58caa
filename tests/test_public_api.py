"""The library that docs/library.md promises: its names, its example, and the commands beside ``python -m``."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import megatron_tropd as tropd
from tests.hf_models import save_hf_checkpoint
from tests.torchrun_jobs import ROOT, environment

EXAMPLE = ROOT / "examples" / "own_training_script.py"
LIBRARY = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
NUM_TOKENS, VOCAB_SIZE, HIDDEN_SIZE, TOP_K = 24, 101, 32, 8


def _dense() -> tuple[float, float, float]:
    """The example once more on whole float64 logits: (loss, share of trusted tokens, norm of the table's gradient)."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden, table, teacher_table = (
        torch.randn(rows, HIDDEN_SIZE, generator=generator).double()
        for rows in (NUM_TOKENS, NUM_TOKENS, VOCAB_SIZE, VOCAB_SIZE)
    )
    label = torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=generator)
    table = (table / 8).requires_grad_()
    log_p = (hidden @ table.T).log_softmax(-1)
    log_q = (teacher_hidden @ (teacher_table / 8).T).log_softmax(-1)
    coin = tropd.uniform(tropd.key(0, tropd.Stream.GATE, step=0), torch.zeros(NUM_TOKENS), torch.arange(NUM_TOKENS))
    total, trusted = torch.zeros((), dtype=torch.float64), 0
    for t in range(NUM_TOKENS):
        lp, reward = log_p[t, label[t]], float(log_q[t, label[t]] - log_p[t, label[t]].detach())
        if float(coin[t]) < min(1.0, torch.tensor(reward).exp().item()):
            trusted += 1
            total = total - reward * (lp - lp.detach()).exp()
        else:
            best = log_q[t].topk(TOP_K).indices
            total = total + (log_q[t, best].exp() * (log_q[t, best] - log_p[t, best])).sum()
    loss = total / NUM_TOKENS
    (gradient,) = torch.autograd.grad(loss, table)
    return float(loss), trusted / NUM_TOKENS, float(gradient.norm())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_example_gives_the_dense_loss_and_gradient_on_any_number_of_ranks(ranks, measured):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    job = subprocess.run(
        [*launch, str(EXAMPLE)], env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert job.returncode == 0, job.stderr
    printed = re.search(r"loss (\S+) trusted (\S+) gradients (\S+)", job.stdout)
    assert printed, job.stdout
    loss, trusted, norm = map(float, printed.groups())
    expected = _dense()
    assert 0.2 < expected[1] < 0.95 and trusted == pytest.approx(expected[1], abs=1e-4)  # both branches are taken
    measured("the library's example: loss", abs(loss - expected[0]), 2e-6)
    measured("the library's example: norm of the gradient", abs(norm - expected[2]), 2e-6)


def test_the_document_quotes_the_example_and_describes_every_name():
    main = (
        EXAMPLE.read_text(encoding="utf-8").split('of a batch that is made up."""\n')[1].split("\n\n\ndef dist_norm")[0]
    )
    quoted = re.search(r"```python\n(.*?)```", LIBRARY, re.DOTALL)
    assert quoted and quoted[1].strip("\n") in re.sub(r"(?m)^    ", "", main), "docs/library.md quotes other code"
    described = set(re.findall(r"^\| `(\w+)`", LIBRARY, re.MULTILINE))
    assert described == set(tropd.__all__)


@pytest.mark.parametrize("name", tropd.__all__)
def test_every_name_is_there_and_says_what_it_is(name):
    assert getattr(tropd, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="megatron_tropd' has no attribute 'tropd_loss'"):
        _ = tropd.tropd_loss


def _run(*words: str | Path, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)], env=environment(), capture_output=True, text=True, timeout=120, **options
    )


@pytest.mark.slow
def test_importing_the_package_imports_neither_torch_nor_megatron():
    code = "import sys, megatron_tropd; print({'torch', 'megatron', 'transformers'} & set(sys.modules))"
    assert _run("-c", code, check=True).stdout.strip() == "set()"


def test_the_version_has_one_source():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert tropd.__version__ == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_commands_are_functions_that_exist():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert set(scripts) == {
        "tropd-train",
        "tropd-benchmark",
        "tropd-evaluate",
        "tropd-convert",
        "tropd-doctor",
        "tropd-generate",
        "tropd-score",
    }
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = readme[readme.index("makes the console commands") :].split(":")[0]
    assert all(f"`{name}`" in listed for name in scripts)
    for target in scripts.values():
        module, function = target.split(":")
        assert f"def {function}(" in (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.thorough
def test_tropd_convert(tmp_path):
    listed = _run("-m", "checkpoint_convert", "--help", check=True).stdout
    assert all(name in listed for name in ("hf-to-megatron", "megatron-to-hf", "megatron-to-megatron", "inspect"))
    wrong = _run("-m", "checkpoint_convert", "inpsect")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "unknown command 'inpsect'" in wrong.stderr
    hf = save_hf_checkpoint(tmp_path / "hf", "qwen3")
    shown = _run("-m", "checkpoint_convert", "inspect", hf, check=True).stdout
    assert "Hugging Face" in shown and "qwen3" in shown
    saved = _run(
        "-m", "checkpoint_convert", "hf-to-megatron", "--hf-checkpoint", hf, "--save", tmp_path / "m", check=True
    )
    assert "release" in saved.stdout and (tmp_path / "m" / "release" / "checkpoint.json").is_file()
    missing = _run("-m", "checkpoint_convert", "inspect", tmp_path / "nothing")
    assert missing.returncode == 2 and "is not a directory" in missing.stderr and "Traceback" not in missing.stderr
