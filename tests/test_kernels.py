"""Triton kernels without a GPU: run by Triton's interpreter against float64, and compiled for a GPU.

Triton comes with a torch for CUDA.  Elsewhere it is looked for in the folder ``triton`` of the environment, where
``make test`` puts it:

    .venv/bin/python -m pip install --no-deps --target .venv/triton triton==3.8.0
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
APART = Path(sys.prefix) / "triton"


def _run(what, tmp_path, **environment):
    if importlib.util.find_spec("triton") is None and not (APART / "triton").is_dir():
        pytest.skip("triton is not installed (the module's docstring says how)")
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", ""), str(APART)])
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernel_checks", what],
        env={**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_interpreted_kernels_equal_float64(tmp_path, measured):
    errors = _run("interpret", tmp_path, TRITON_INTERPRET="1")
    assert len(errors) == 12
    for name, error in errors.items():
        # The interpreter cuts bf16 off where a GPU rounds; row statistics leave in fp32 whatever the logits are.
        exact = "fp32" in name or "statistics" in name or "top-k" in name
        measured(f"Triton kernels, interpreted: {name} (relative to float64)", error, 2e-6 if exact else 2**-7)


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(tmp_path):
    sizes = _run("compile", tmp_path, TRITON_INTERPRET="0")
    assert len(sizes) == 6 and all(size > 1000 for size in sizes.values())
