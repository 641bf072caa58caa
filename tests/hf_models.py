"""Tiny random Hugging Face checkpoints, each chosen to catch a way of getting a layout wrong."""

from __future__ import annotations

import json
from pathlib import Path

import torch

VOCAB_SIZE = 131  # prime: no padding rule divides it
VARIANTS: dict[str, dict] = {
    "qwen2": {},
    "qwen2_tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 24},  # heads x head_dim is not the hidden size
    "qwen3_tied": {"head_dim": 8, "tie_word_embeddings": True},
    "qwen3_moe": {"head_dim": 12, **(experts := {"num_experts": 4, "moe_intermediate_size": 20, "num_experts_per_tok": 2}),
                  "norm_topk_prob": True},
    "qwen3_moe_tied": {"head_dim": 8, **experts, "norm_topk_prob": False, "tie_word_embeddings": True},
    "llama": {"head_dim": 16},
    "llama_tied": {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"head_dim": 12, "sliding_window": 20},  # the longest sequence of the parity tests
    "qwen3_yarn": {
        "head_dim": 24,
        "rope_parameters": {  # no number is its default, and the ramp lies in the middle of the dimensions
            "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 64,
            "attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False,
        },
    },
}  # fmt: skip
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 48, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def family_of(variant: str) -> str:
    """The ``model_type`` of a variant."""
    return variant.removesuffix("_tied").removesuffix("_yarn")


def make_hf_model(variant: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides):
    """A random model of a :data:`VARIANTS` name.  Norms, biases and weights are far from their defaults."""
    import transformers

    prefix = family_of(variant).title().replace("_", "")
    config = getattr(transformers, prefix + "Config")(**{**SIZES, **VARIANTS[variant], **overrides})
    config._attn_implementation = "eager"
    generator = torch.Generator().manual_seed(seed)
    model = getattr(transformers, prefix + "ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            center = 1.0 if "norm" in name else 0.0
            parameter.copy_(center + (0.3 if parameter.ndim == 1 else 0.08) * noise)
    return model.to(dtype).eval()


def save_tokenizer(directory: str | Path, vocab_size: int = VOCAB_SIZE) -> None:
    """A word-level tokenizer: w3 is token 3; <pad>, <s> and </s> are 0, 1 and 2."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, vocab_size - 1)), "<unk>"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)


def save_hf_checkpoint(
    directory: str | Path, variant: str, *, dtype: torch.dtype = torch.float32, seed: int = 0,
    max_shard_size: str = "5GB", **overrides,
) -> Path:  # fmt: skip
    """Weights (by transformers itself), config, generation config and tokenizer in ``directory``."""
    directory = Path(directory)
    make_hf_model(variant, dtype=dtype, seed=seed, **overrides).save_pretrained(
        directory, max_shard_size=max_shard_size
    )
    save_tokenizer(directory, overrides.get("vocab_size", VOCAB_SIZE))
    return directory


def read_tensors(directory: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint directory, in memory (load_file's own are views of the file)."""
    from safetensors.torch import load_file

    paths = sorted(Path(directory).glob("*.safetensors"))
    return {name: tensor.clone() for path in paths for name, tensor in load_file(path).items()}


def write_tensors(directory: str | Path, tensors: dict[str, torch.Tensor], file: str = "model.safetensors") -> Path:
    """Replace the weights of a one-file checkpoint (to damage it in a chosen way)."""
    from safetensors.torch import save_file

    path = Path(directory) / file
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return path


def edit_config(directory: str | Path, **changes) -> None:
    path = Path(directory) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2))
