"""Conversions in many small bands, and what they convert; shared by the tests of streamed conversion."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from checkpoint_convert import common, hf_to_megatron
from megatron_tropd.parallel.groups import release_groups
from tests.hf_models import save_hf_checkpoint

SMALL_BUFFER = 700
"""Bytes: a few rows of the tiny models' tensors, so that every tensor is many bands."""


def run_streamed(command, *flags):
    """A conversion in many small bands."""
    release_groups()
    with patch.object(common, "buffer_bytes", lambda args: SMALL_BUFFER):
        command([str(flag) for flag in flags])


def error_of(command, *flags):
    with pytest.raises(ValueError) as caught:
        run_streamed(command, *flags)
    return str(caught.value)


def save_sources(root: Path) -> dict[str, Path]:
    """A dense model with biases and a sparse one, bf16; the sparse one in shards."""
    return {
        name: save_hf_checkpoint(root / name, name, dtype=torch.bfloat16, max_shard_size=size)
        for name, size in (("qwen2_tied", "5GB"), ("qwen3_moe", "40KB"))
    }


def convert_sources(pool, sources: dict[str, Path], root: Path) -> Path:
    """Each source as a Megatron checkpoint under ``root``."""
    for name, hf in sources.items():
        pool.run(run_streamed, hf_to_megatron.convert, "--hf-checkpoint", hf, "--save", root / name)
    return root
