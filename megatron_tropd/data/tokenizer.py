"""Tokenizers and stop tokens, read only from a local Hugging Face directory, never from the network."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tropd.json_files import culprit, read_json_object, shown

if TYPE_CHECKING:  # importing transformers takes seconds, so only load_tokenizer does it
    from transformers import PreTrainedTokenizerBase

_SETTINGS_FILES = ("tokenizer_config.json", "config.json")
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
    try:
        return _read(path)
    except Exception as error:
        # The Rust reader raises bare Exception on a broken tokenizer.json, so a narrower type is not enough.
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"tokenizer: {_culprit(path)} cannot be read: {reason}") from error


def _read(path: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer and try what a run does with it: some settings are read only then."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        str(path), local_files_only=True, trust_remote_code=False
    )
    tokenizer.encode("")  # reads model_max_length
    for value in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if value is not None and not isinstance(value, int):
            raise ValueError(f"a special token has the id {shown(value)}")
    return tokenizer


def _culprit(path: Path) -> str:
    """Return what keeps a tokenizer from being read: a file and, where one key of it is to blame, the key."""
    from tokenizers import Tokenizer

    settings: dict[str, dict[str, Any]] = {}
    for name in (*_SETTINGS_FILES, "special_tokens_map.json", "tokenizer.json"):
        if (path / name).is_file():
            try:
                settings[name] = read_json_object(path / name)
            except (OSError, ValueError):
                return str(path / name)
    if "tokenizer.json" in settings:
        try:
            Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception:  # as in load_tokenizer
            return str(path / "tokenizer.json")
    for name in _SETTINGS_FILES:
        if key := culprit(settings.get(name, {}), partial(_reads_with, path, name)):
            return f"{path / name} with {key} {shown(settings[name][key])}"
    return str(path / "tokenizer.json") if "tokenizer.json" in settings else f"the files in {path}"


def _reads_with(path: Path, name: str, content: dict[str, Any]) -> bool:
    """Return whether the tokenizer of ``path`` can be read if one of its JSON files has another content."""
    with tempfile.TemporaryDirectory() as folder:
        for file in path.iterdir():
            if file.name != name:
                (Path(folder) / file.name).symlink_to(file.absolute())
        (Path(folder) / name).write_text(json.dumps(content), encoding="utf-8")
        try:
            _read(Path(folder))
        except Exception:  # as in load_tokenizer
            return False
        return True


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
    return _as_ids(read_json_object(path).get("eos_token_id"), path)


def _as_ids(value: object, path: Path) -> list[int]:
    if value is None:
        return []
    ids = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
        raise ValueError(f"{path}: eos_token_id is {shown(value)}; expected a token id or a list of token ids")
    return list(ids)
