"""Normalised texts, their words, and the key of a prompt.

Two texts are the same after normalisation if they differ only in case, in whitespace, or in forms of a character that
Unicode calls compatible (NFKC): a full-width digit and a digit, a ligature and its letters.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

from tools.prompt_preparation.drafts import Message

_KEY_BYTES = 10
"""Of a hash: among ten million prompts, two have the same 80 bits with a probability of 4e-11."""
_IDEOGRAPHS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(f"[{_IDEOGRAPHS}]|[^\\W{_IDEOGRAPHS}]+")


def normalised(text: str) -> str:
    """Return ``text`` in NFKC and without case, with one space for all whitespace between its words."""
    folded = text.lower() if text.isascii() else _folded(text)
    return " ".join(folded.split())


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def words_of(text: str) -> list[str]:
    """Return the words of a text: runs of letters, digits and underscores, and each Chinese or Japanese character."""
    return _WORD.findall(normalised(text))


def key_of(messages: Sequence[Message]) -> int:
    """Return a number below 2**80 that is the same for the same conversation after normalisation."""
    state = hashlib.blake2b(digest_size=_KEY_BYTES)
    for message in messages:
        state.update(f"{message['role']}\x1f{normalised(message['content'])}\x1e".encode())
    return int.from_bytes(state.digest(), "big")


def uid_of(key: int) -> str:
    """Return the uid of a prompt by its key: 20 hexadecimal digits."""
    return f"{key:0{2 * _KEY_BYTES}x}"


def short_hash(text: str) -> int:
    """Return 63 bits of a hash of ``text``."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
