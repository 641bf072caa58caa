"""The versions that the tests run with; tests/test_doctor.py compares them with requirements/ and the Makefile."""

from __future__ import annotations

MEGATRON_OF_PYTHON = {(3, 11): "0.16.1", (3, 12): "0.19.2", (3, 13): "0.19.2"}
"""Python version -> version of megatron-core.  megatron-core 0.19.2 needs Python 3.12."""

TORCH = "2.13.0"
TRANSFORMERS = "5.23.0"
SGLANG = "0.5.23"

OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 6)
"""As in pyproject.toml."""

REQUIRED = (
    "torch", "megatron-core", "transformers", "huggingface_hub", "safetensors", "numpy", "datasets", "filelock",
    "pyarrow", "einops", "psutil", "PyYAML", "httpx2", "rich", "matplotlib", "math-verify",
)  # fmt: skip
"""The dependencies of pyproject.toml."""
