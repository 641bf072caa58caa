"""Published models by name, with the keys of ``config.json`` that decide the shapes of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.models.hf_config import architecture_from_hf_config, load_architecture

_COLUMNS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
_DENSE: dict[str, tuple[Any, ...]] = {
    "qwen3-0.6b": ("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, True),
    "qwen3-1.7b": ("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, True),
    "qwen3-4b": ("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, True),
    "qwen3-8b": ("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, False),
    "qwen3-14b": ("qwen3", 5120, 17408, 40, 40, 8, 128, 151936, False),
    "qwen3-32b": ("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, False),
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, True),
    "qwen2.5-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, True),
    "qwen2.5-3b": ("qwen2", 2048, 11008, 36, 16, 2, 128, 151936, True),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, False),
    "qwen2.5-14b": ("qwen2", 5120, 13824, 48, 40, 8, 128, 152064, False),
    "qwen2.5-32b": ("qwen2", 5120, 27648, 64, 40, 8, 128, 152064, False),
    "qwen2.5-72b": ("qwen2", 8192, 29568, 80, 64, 8, 128, 152064, False),
    "llama-3.1-8b": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, False),
}
_SPARSE: dict[str, tuple[Any, ...]] = {  # with two more columns: experts, columns of an expert
    "qwen3-30b-a3b": ("qwen3_moe", 2048, 6144, 48, 32, 4, 128, 151936, False, 128, 768),
    "qwen3-235b-a22b": ("qwen3_moe", 4096, 12288, 94, 64, 4, 128, 151936, False, 128, 1536),
}
NAMES = (*_DENSE, *_SPARSE)


def config_of(name: str) -> dict[str, Any]:
    """The shape-giving part of a model's ``config.json``; keys that do not affect shapes have filler values."""
    row = _DENSE.get(name) or _SPARSE[name]
    config = dict(zip((*_COLUMNS, "num_experts", "moe_intermediate_size"), row, strict=False))
    return {**config, "num_experts_per_tok": 8, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960}


def find_architecture(model: str) -> Architecture:
    """A model by name, or by the path of its ``config.json`` or of the directory that holds it.

    Raises:
        ValueError: ``model`` is neither (the message lists the known names), or the model is not supported.
    """
    if model.lower() in NAMES:
        return architecture_from_hf_config(config_of(model.lower()))
    path = Path(model)
    if path.name == "config.json":
        path = path.parent
    if not (path / "config.json").is_file():
        raise ValueError(f"--model {model} is no directory with a config.json and none of {', '.join(NAMES)}")
    return load_architecture(path)
