"""Tokenizers and stop tokens, read only from a local Hugging Face directory, never from the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # importing transformers takes seconds, so only load_tokenizer does it
    from transformers import PreTrainedTokenizerBase

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model")


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a local HF directory, without network access and without running code from the directory.

    Raises:
        FileNotFoundError: no such directory, or no vocabulary file in it.
        ValueError: the files are there but transformers cannot read them.
    """
    path = Path(directory)
    if not path.is_dir():
        raise FileNotFoundError(f"tokenizer: {path} is not a directory; expected a local Hugging Face model directory")
    if not any((path / name).is_file() for name in _VOCABULARY_FILES):
        held = ", ".join(sorted(entry.name for entry in path.iterdir())[:12]) or "nothing"
        raise FileNotFoundError(
            f"tokenizer: {path} holds no vocabulary; expected one of {', '.join(_VOCABULARY_FILES)}, found {held}"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        # The Rust reader raises bare Exception on a broken tokenizer.json, so a narrower type is not enough.
        raise ValueError(f"tokenizer: the files in {path} cannot be read: {error}") from error
    return tokenizer


def eos_token_ids(hf_dir: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> tuple[int, ...]:
    """Return every id that ends a response of this model, the one that it normally writes first.

    The union of ``eos_token_id`` in generation_config.json, in config.json and in the tokenizer, in this
    order: chat models often list their turn end only in the first and their text end only in the others,
    and a rollout that continues beyond either is useless.

    Args:
        hf_dir: local HF directory.
        tokenizer: the one of that directory, if it is already loaded (loading a large one takes half a second).

    Raises:
        FileNotFoundError: no tokenizer in the directory.
        ValueError: a file is not JSON, an id is not an integer, or no id is found anywhere.
    """
    path = Path(hf_dir)
    found = [*_declared_ids(path / "generation_config.json"), *_declared_ids(path / "config.json")]
    of_tokenizer = (tokenizer or load_tokenizer(path)).eos_token_id
    if of_tokenizer is not None:
        found += _as_ids(of_tokenizer, path / "tokenizer_config.json")
    if not found:
        raise ValueError(
            f"no stop token: {path} names no eos_token_id in generation_config.json, config.json or its tokenizer"
        )
    return tuple(dict.fromkeys(found))


def _declared_ids(path: Path) -> list[int]:
    """Return ``eos_token_id`` of one JSON file as a list; [] if the file or key is missing, or the value null."""
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return _as_ids(content.get("eos_token_id"), path)


def _as_ids(value: object, path: Path) -> list[int]:
    if value is None:
        return []
    ids = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in ids):
        raise ValueError(f"{path}: eos_token_id is {value!r}; expected an integer or a list of integers")
    return list(ids)
