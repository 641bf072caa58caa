"""A world for the whole way of an experiment: two models that know nothing yet, and data as it is published.

The questions ask for the last digit of a number, so models of 60 thousand parameters learn them in a minute, and are
right about numbers that they have not seen.  The tokenizer has one token a byte: it reads any prompt, also those of the
benchmarks.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIALS = ("<pad>", "<eos>", "<user>", "<assistant>")
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NUM_BENCHMARK, NUM_PUBLISHED, NUM_LESSONS = 30, 400, 2000
"""Questions of the benchmark (AIME has as many), of the data set for reinforcement learning, and with answers."""
HIDDEN = {"teacher": 64, "student": 48}


def make_world(directory: Path, seed: int = 0) -> None:
    """Write models and data below ``directory``, which is there as a whole or not at all:

    base/teacher, base/student   random weights, a tokenizer of bytes and a chat template
    published/rl.jsonl           questions in the rows of DAPO and Skywork-OR1, some twice, some of the benchmark
    published/chat.jsonl         questions with answers, as messages
    benchmarks/aime24/           questions in the columns of AIME 2024
    """
    unfinished = directory.with_name(f".{directory.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    _write_world(unfinished, seed)
    unfinished.rename(directory)


def _write_world(directory: Path, seed: int) -> None:
    for name, hidden in HIDDEN.items():
        _save_model(directory / "base" / name, hidden, seed=Random(f"{seed} {name}").getrandbits(32))
    numbers = Random(f"{seed} numbers").sample(range(100, 100_000), NUM_BENCHMARK + NUM_PUBLISHED + NUM_LESSONS)
    held_out, published = numbers[:NUM_BENCHMARK], numbers[NUM_BENCHMARK : NUM_BENCHMARK + NUM_PUBLISHED]
    leaked = [*published, *published[:20], *held_out[:5]]  # duplicates and contamination, which preparation removes
    _write(directory / "published/rl.jsonl", (_rl_row(index, number) for index, number in enumerate(leaked)))
    _write(directory / "published/chat.jsonl", (_chat_row(number) for number in numbers[-NUM_LESSONS:]))
    _write(directory / "benchmarks/aime24/aime24.jsonl", (
        {"id": index, "problem": _question(number), "answer": _answer(number)} for index, number in enumerate(held_out)
    ))  # fmt: skip


def _question(number: int) -> str:
    return f"What is the last digit of {number}?"


def _answer(number: int) -> str:
    return str(number % 10)


def _rl_row(index: int, number: int) -> dict[str, Any]:
    return {
        "data_source": "last_digit", "ability": "MATH", "prompt": [{"role": "user", "content": _question(number)}],
        "reward_model": {"ground_truth": _answer(number), "style": "rule"}, "extra_info": {"index": index},
    }  # fmt: skip


def _chat_row(number: int) -> dict[str, Any]:
    reply = f"The number ends in {_answer(number)}, so it is \\boxed{{{_answer(number)}}}."
    return {
        "messages": [{"role": "user", "content": _question(number)}, {"role": "assistant", "content": reply}],
        "category": "math",
    }  # fmt: skip


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _save_model(directory: Path, hidden: int, seed: int) -> None:
    tokenizer = _tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config).float()
        for name, weight in model.named_parameters():
            if weight.ndim > 1:  # the 0.02 of large models starts slowly in small ones
                torch.nn.init.normal_(weight, 0.0, 1.0 if "embed" in name else 1 / math.sqrt(weight.shape[1]))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate([*SPECIALS, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIALS[0], eos_token=SPECIALS[1],
        additional_special_tokens=list(SPECIALS[2:]), clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast
