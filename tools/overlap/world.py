"""Random models and prompts whose costs can be chosen."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

VOCAB_SIZE = 512
_WORDS = range(3, VOCAB_SIZE - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What makes a part of a step cheap or dear."""

    teacher_layers: int
    """Scoring."""
    prompt_words: int
    """Training and scoring; generation reads a prompt once for all its samples."""


def make_world(root: Path, costs: Costs, *, num_prompts: int, seed: int = 0) -> Path:
    """Write ``student/``, ``teacher/`` (Qwen3 with random weights, one tokenizer) and ``train.jsonl``."""
    shutil.rmtree(root, ignore_errors=True)
    _save_model(root / "student", seed=seed, hidden=256, layers=4)
    _save_model(root / "teacher", seed=seed + 1, hidden=512, layers=costs.teacher_layers)
    draw = random.Random(seed)
    rows = [
        {"prompt": " ".join(f"w{draw.choice(_WORDS)}" for _ in range(costs.prompt_words))} for _ in range(num_prompts)
    ]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def _save_model(directory: Path, *, seed: int, hidden: int, layers: int) -> None:
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
        head_dim=hidden // 8, intermediate_size=3 * hidden, vocab_size=VOCAB_SIZE, max_position_embeddings=4096,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(directory)
    _save_tokenizer(directory)


def _save_tokenizer(directory: Path) -> None:
    """One token for each word: w3 is token 3."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in _WORDS), "<unk>"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
