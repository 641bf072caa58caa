"""Our boxes of an engine against SGLang's own modules and its own ``load_weights``, for every rank of a layout."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.sglang_helpers import PYTHON, needs_sglang

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
CASES = (
    {"family": "qwen3", "tp": 4},  # two key/value heads on four ranks
    {"family": "qwen3", "tp": 1, "tie_word_embeddings": True},
    {"family": "qwen2", "tp": 2, "tie_word_embeddings": True},
    {"family": "qwen2", "tp": 8, "num_key_value_heads": 2},
    {"family": "llama", "tp": 2, "num_key_value_heads": 8},
    {"family": "qwen3", "tp": 3, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 100},
    {"family": "qwen3_moe", "tp": 2},
    {"family": "qwen3_moe", "tp": 4, "ep": 2},
    {"family": "qwen3_moe", "tp": 4, "ep": 4},
    {"family": "llama", "tp": 2, "intermediate_size": 80, "cpu": True},
    {"family": "qwen3_moe", "tp": 2, "ep": 2, "moe_intermediate_size": 72, "cpu": True},
)


@needs_sglang
def test_sglang_loads_every_parameter_of_every_rank_into_our_boxes():
    done = subprocess.run(
        [str(PYTHON), "-m", "tests.sglang_modules", *map(json.dumps, CASES)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [result["case"] for result in results] == list(CASES)
    for result in results:
        assert result["compared"] >= 15 * result["case"]["tp"], result
