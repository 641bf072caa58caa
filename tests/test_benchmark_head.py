"""The benchmark of the head runs, passes its own accuracy gate and says what it did not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def test_a_small_benchmark(tmp_path):
    words = (
        "--tokens 64 128 --hidden 16 --vocab 503 --chunk 32 --memory-hidden 16 --memory-chunk 16 --repeats 1 --warmup 0"
    )
    done = subprocess.run(
        [sys.executable, "tools/benchmark_head.py", *words.split(), "--out", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "head_benchmark.json").read_text())
    rows = {row["name"]: row for row in found["tables"][0]["rows"]}
    for name in ("naive log-softmax", "ours, one-pass", "ours, recompute", "ours, single chunk"):
        row = rows[name]
        assert row["error"] < 1e-5 and row["peak_bytes"] > 0 and row["ratio"] > 0 and not row["note"], row
    assert rows["ours, one-pass"]["peak_bytes"] < rows["naive log-softmax"]["peak_bytes"]
    for peer in ("verl, Triton linear CE", "Liger, Triton FLCE"):  # need a GPU, and packages that are not installed
        assert found["absent"][peer]
    assert (tmp_path / "head_benchmark.md").read_text() in done.stdout
    assert (tmp_path / "head_benchmark.png").stat().st_size > 5000
