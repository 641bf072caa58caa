"""A real byte-level tokenizer, saved to disk and read back as a user's would be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_tropd.data.tokenizer import eos_token_ids, load_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}<{{ m['role'] }}>{{ m['content'] }}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def save_tokenizer(directory: Path, *, chat: bool = False, eos: str | None = "<eos>") -> Path:
    """One id per byte after <eos>=0, <user>=1, <assistant>=2, <end>=3."""
    specials = ["<eos>", "<user>", "<assistant>", "<end>"]
    vocab = {piece: index for index, piece in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, additional_special_tokens=specials)
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return directory


def test_load_reads_a_local_directory(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "t"))
    ids = tokenizer.encode("ab<eos>", add_special_tokens=False)
    assert len(ids) == 3 and ids[-1] == tokenizer.eos_token_id == 0


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a directory"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no vocabulary.*tokenizer\.json.*found config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"cannot be read"):
        load_tokenizer(tmp_path)


def test_eos_ids_are_a_union_in_order(tmp_path):
    directory = save_tokenizer(tmp_path / "t")
    assert eos_token_ids(directory) == (0,)
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 7]}))
    assert eos_token_ids(directory) == (3, 7, 0)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    assert eos_token_ids(directory) == (7, 0)


@pytest.mark.parametrize("content", ['{"eos_token_id": "x"}', '{"eos_token_id": [true]}', "[]", "{"])
def test_eos_ids_refuse_nonsense(tmp_path, content):
    directory = save_tokenizer(tmp_path / "t")
    (directory / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        eos_token_ids(directory)


def test_eos_ids_must_exist(tmp_path):
    directory = save_tokenizer(tmp_path / "t", eos=None)
    with pytest.raises(ValueError, match="no stop token"):
        eos_token_ids(directory)
