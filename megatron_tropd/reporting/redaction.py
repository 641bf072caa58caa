"""Keeps secrets out of the files that a run writes.

A value is hidden if its name says that the value is a secret.  The rule looks for words inside a name, so it
hides too much rather than too little; numbers under a ``token`` name (``max-tokens-per-microbatch``,
``eos_token_id``), column names of data files and anything about a tokenizer are shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "[hidden]"

# ``input-key: prompt`` names a column of a data file.
_COLUMN = re.compile(r"(input|prompt|response|answer|label|text|domain|metadata|column)[-_]?key\Z", re.IGNORECASE)
_SECRET = re.compile(r"key|secret|passw|credential|authorization", re.IGNORECASE)
_TOKEN = re.compile(r"token(?!iz)", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?\d{1,12}(\.\d+)?(e[-+]?\d+)?\Z", re.IGNORECASE)
_URL_USER = re.compile(r"(?<=://)[^/\s@]+(?=@)")
_KNOWN_TOKEN = re.compile(r"\b(hf_|ghp_|github_pat_|sk-)[A-Za-z0-9_-]{16,}")


def is_secret(name: str, value: object) -> bool:
    """Whether the value under this name must not be written down."""
    if value is None or isinstance(value, bool) or _COLUMN.search(name):
        return False
    if _SECRET.search(name):
        return True
    return bool(_TOKEN.search(name)) and not _NUMBER.match(str(value))


def redact_text(text: str) -> str:
    """Hide the user part of URLs and strings that look like access tokens."""
    return _KNOWN_TOKEN.sub(HIDDEN, _URL_USER.sub(HIDDEN, text))


def redact_mapping(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same mapping with secret values hidden, nested mappings too."""
    return {name: _redact_value(name, value) for name, value in values.items()}


def _redact_value(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return redact_mapping(value)
    if isinstance(value, list | tuple):
        return [_redact_value(name, item) for item in value]
    if is_secret(name, value):
        return HIDDEN
    return redact_text(value) if isinstance(value, str) else value


def redact_argv(argv: Sequence[str]) -> list[str]:
    """A command line with secret values hidden, in both forms: ``--name value`` and ``--name=value``."""
    shown: list[str] = []
    owner = ""  # the flag whose values follow; a flag may take several
    for word in argv:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            owner = "" if equals else name
            shown.append(f"{name}={_redact_value(name, value)}" if equals else word)
        elif equals and re.match(r"\w+\Z", name) and is_secret(name, value):
            shown.append(f"{name}={HIDDEN}")
        else:
            shown.append(str(_redact_value(owner, word)))
    return shown
