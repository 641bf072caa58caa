"""A Megatron checkpoint through the benchmark command: converted, served by a real SGLang server, asked by evalscope."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from megatron_tropd.benchmark import main
from megatron_tropd.benchmarks.model_source import from_megatron
from megatron_tropd.benchmarks.run import CONVERTED
from tests.benchmark_data import write_all
from tests.hf_models import save_hf_checkpoint
from tests.sglang_helpers import PYTHON, needs_sglang
from tests.test_benchmark_command import PYTHON as EVALSCOPE
from tests.test_benchmark_command import needs_evalscope, rows_of

pytestmark = [pytest.mark.slow, pytest.mark.servers, needs_evalscope, needs_sglang]
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


def test_a_megatron_checkpoint_is_evaluated(tmp_path, capfd):
    model = save_hf_checkpoint(tmp_path / "hf", "qwen3")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    convert = [sys.executable, "-m", "checkpoint_convert.hf_to_megatron", "--hf-checkpoint", str(model)]
    subprocess.run([*convert, "--save", str(tmp_path / "megatron")], check=True)
    output, said = tmp_path / "out", []
    from_megatron(tmp_path / "megatron", None, output / CONVERTED, said.append, keeps=False)
    assert said == [f"converting {tmp_path / 'megatron/release'} to {output / CONVERTED}"]
    code = main([
        "--load", str(tmp_path / "megatron"), "--data-dir", str(write_all(tmp_path / "data")), "--output", str(output),
        "--benchmarks", "aime25", "--samples", "aime25=3", "--max-tokens", "12", "--evalscope-python", str(EVALSCOPE),
        "--sglang-python", str(PYTHON), "--sglang-max-total-tokens", "2048", "--sglang-start-timeout", "300",
    ])  # fmt: skip
    error = capfd.readouterr().err
    assert code == 0, error
    assert "converting" not in error  # that was done already
    rows = rows_of(output, "aime25")
    assert [row["question"] for row in rows] == ["test/0", "test/1"]
    for row in rows:
        assert row["scores"]["accuracy"] == [0.0] * 3
        assert all(1 <= tokens <= 12 for tokens in row["tokens"])
        assert all(
            (tokens == 12) or finish == "stop" for tokens, finish in zip(row["tokens"], row["finish"], strict=True)
        )
    lines = (output / "evalscope/aime25/predictions/model/tropd_aime25_default.jsonl").read_text().splitlines()
    texts = [json.loads(line)["model_output"]["choices"][0]["message"]["content"] for line in lines]
    assert len(set(texts)) == 6  # samples of one question differ
    assert not (output / CONVERTED).exists()
    assert json.loads((output / "config.json").read_text())["model_name"] == "megatron/release"
