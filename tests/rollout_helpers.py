"""Tiny random HF models and requests for the tests of rollout and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from megatron_tropd.rng import Stream
from megatron_tropd.rollout.embedded.engine import EmbeddedEngine
from megatron_tropd.rollout.engine import SamplingParams
from megatron_tropd.types import GenerationRequest

VOCAB = 60
CONFIGS = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig}


def tiny_model(directory: Path, *, family: str = "qwen3", tied: bool = True, seed: int = 0) -> PreTrainedModel:
    """A 2-layer random model, saved to ``directory``; large weights make its distributions uneven."""
    config = CONFIGS[family](
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=tied,
        initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)  # biases and norms must matter too
    model.save_pretrained(directory)
    return model


def push(engine: EmbeddedEngine, model: PreTrainedModel, version: int = 1) -> None:
    """A whole update; a tied model sends its embedding only."""
    engine.begin_update(version)
    engine.update(model.named_parameters())
    engine.end_update(version)


def tiny_engine(directory: Path, *, stop: Sequence[int] = (1,), **settings) -> tuple[EmbeddedEngine, PreTrainedModel]:
    """An engine that is ready, and the model whose weights it has."""
    options = {key: settings.pop(key) for key in ("family", "tied") if key in settings}
    model = tiny_model(directory, **options)
    engine = EmbeddedEngine(directory, stop_token_ids=stop, **settings)
    push(engine, model)
    return engine, model


def requests_of(lengths: Sequence[int], *, max_new: int = 12, guidance: int = 0) -> list[GenerationRequest]:
    """Requests of the given total lengths (guidance included), random but fixed tokens."""
    generator = torch.Generator().manual_seed(7)
    return [
        GenerationRequest(
            prompt_uid=100 + i,
            sample_index=i % 3,
            token_ids=tuple(torch.randint(2, VOCAB, (n,), generator=generator).tolist()),
            prompt_len=n - guidance,
            guidance_len=guidance,
            max_new_tokens=max_new,
        )
        for i, n in enumerate(lengths)
    ]


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"seed": 3, "stream": Stream.SAMPLING, "step": 5, **changes})


def word_tokenizer(
    directory: Path, words: Sequence[str] | None = None, **special: str | None
) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, saved to ``directory``; by default ``w0`` .. with <pad>, <eos> at 0, 1."""
    words = words if words is not None else ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCAB))]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w2"))
    model.pre_tokenizer = WhitespaceSplit()
    named = {"eos_token": "<eos>", "pad_token": "<pad>", **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **{k: v for k, v in named.items() if v})
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    return tokenizer
