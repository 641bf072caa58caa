"""Architectures of the acceptance: Qwen3's sizes, and tiny ones that run the same lines on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_tropd.models.architecture import Architecture

VOCAB = 151_936


def _qwen3(
    hidden: int, ffn: int, layers: int, heads: int, *, tied: bool, groups: int = 8, head_dim: int = 128,
    vocab: int = VOCAB,
) -> Architecture:  # fmt: skip
    return Architecture(
        family="qwen3", vocab_size=vocab, hidden_size=hidden, ffn_hidden_size=ffn, num_layers=layers,
        num_attention_heads=heads, num_query_groups=groups, head_dim=head_dim, norm_epsilon=1e-6,
        max_position_embeddings=40960, tie_word_embeddings=tied, rope_theta=1e6,
    )  # fmt: skip


QWEN3_0_6B = _qwen3(1024, 3072, 28, 16, tied=True)
QWEN3_1_7B = _qwen3(2048, 6144, 28, 16, tied=True)
QWEN3_4B = _qwen3(2560, 9728, 36, 32, tied=True)
QWEN3_8B = _qwen3(4096, 12288, 36, 32, tied=False)
FEW_LAYERS = _qwen3(1024, 3072, 4, 16, tied=True)
"""Qwen3-0.6B with 4 of its 28 layers: a checkpoint of it is written in seconds."""
SHALLOW = _qwen3(512, 1536, 4, 8, tied=True, groups=4, head_dim=64, vocab=32_000)
"""For comparisons in fp32 between several processes."""
TINY = _qwen3(64, 96, 2, 4, tied=True, groups=2, head_dim=16, vocab=1003)
TINY_TEACHER = _qwen3(96, 128, 2, 4, tied=False, groups=2, head_dim=16, vocab=1003)


def hf_config(arch: Architecture) -> dict[str, Any]:
    """Return the ``config.json`` of an architecture of this module.  Its end token is the last id."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.head_dim,
        "rms_norm_eps": arch.norm_epsilon,
        "max_position_embeddings": arch.max_position_embeddings,
        "tie_word_embeddings": arch.tie_word_embeddings,
        "rope_theta": arch.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": stop_token(arch),
    }


def stop_token(arch: Architecture) -> int:
    """Return the id that ends a response."""
    return arch.vocab_size - 1


def write_hf_config(arch: Architecture, directory: Path) -> Path:
    """Write ``config.json`` into ``directory`` and return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf_config(arch), indent=1), encoding="utf-8")
    return directory
