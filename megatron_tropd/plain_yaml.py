"""Read YAML files of settings as they are written: one mapping of names to words or lists of words.

YAML 1.1 reads ``no`` as false, ``010`` as 8, ``1:30`` as 90, ``2024-1-1`` as a date and ``1e-5`` as a string, and its
parsers let the last of two equal keys win.  Here a word stays the word that is in the file, and the reader of a setting
knows which type it has.  Tags, nested values and keys given twice are errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

MAX_BYTES = 1 << 20
"""A larger file is refused; no file of settings is so large."""
NULL_WORDS = ("", "~", "null", "Null", "NULL")
_TEXT, _LIST = "tag:yaml.org,2002:str", "tag:yaml.org,2002:seq"


@dataclass(frozen=True, slots=True)
class Word:
    """A value as it stands in the file."""

    text: str
    quoted: bool
    """Whether the file has it in quotes or as a block of text; ``'null'`` is a word, ``null`` is no value."""

    @property
    def is_null(self) -> bool:
        """Whether it stands for no value."""
        return not self.quoted and self.text in NULL_WORDS


Value = Word | tuple[Word, ...]


class PlainYamlError(ValueError):
    """The file cannot be used.  The messages quote keys but no values, which may be secrets."""

    def __init__(self, errors: Sequence[str], settings: Mapping[str, Value] | None = None) -> None:
        self.errors = tuple(errors)
        """One sentence for each fault, without the name of the file."""
        self.settings = dict(settings or {})
        """The settings that have no fault, so that a caller can check them too."""
        super().__init__("; ".join(self.errors))


class _Loader(yaml.SafeLoader):
    """Gives every scalar without a tag the type of a string."""


_Loader.yaml_implicit_resolvers = {}


def read_plain_yaml(path: str | Path) -> dict[str, Value]:
    """Return the settings of a file by name, with ``-`` for ``_`` in names.

    Raises:
        OSError: the file cannot be read.
        PlainYamlError: it is too large, not UTF-8 or not YAML, or holds other things than names with words.
    """
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise PlainYamlError([f"has more than {MAX_BYTES} bytes, which no file of settings has"])
    try:
        document = yaml.compose(content.decode("utf-8-sig"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise PlainYamlError([f"is not valid YAML: byte {error.start} is not UTF-8 text"]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        place = f" in line {mark.line + 1}" if mark else ""
        raise PlainYamlError([f"is not valid YAML{place}: {reason}"]) from None
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        # A character that YAML does not allow, very deep nesting, or an escape beyond Unicode.
        raise PlainYamlError([f"is not valid YAML: {' '.join(str(error).split())}"]) from None
    if document is None:
        return {}
    if not isinstance(document, yaml.MappingNode):
        kind = "list" if isinstance(document, yaml.SequenceNode) else "word"
        raise PlainYamlError([f"holds a {kind}, expected a mapping of flag: value"])
    return _settings(document)


def _settings(document: yaml.MappingNode) -> dict[str, Value]:
    settings: dict[str, Value] = {}
    lines: dict[str, int] = {}
    errors = []
    for key, value in document.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag != _TEXT:
            errors.append(f"line {line}: a key must be one word")
            continue
        if not key.value.isprintable():
            errors.append(f"line {line}: the key {key.value[:80]!a} has characters that no name has")
            continue
        name = key.value.replace("_", "-")
        if name in lines:
            errors.append(f"{name[:80]}: is given twice, in line {lines[name]} and in line {line}; keep one of them")
            continue
        lines[name] = line
        try:
            settings[name] = _value(value)
        except ValueError as error:
            errors.append(f"{name[:80]}: {error}")
    if errors:
        raise PlainYamlError(errors, settings)
    return settings


def _value(node: yaml.Node) -> Value:
    if isinstance(node, yaml.SequenceNode) and node.tag == _LIST:
        return tuple(_word(item, "a list of words") for item in node.value)
    return _word(node, "one word or a list of words")


def _word(node: yaml.Node, expected: str) -> Word:
    if not isinstance(node, yaml.ScalarNode):
        kind = "mapping" if isinstance(node, yaml.MappingNode) else "list"
        raise ValueError(f"has a {kind} in line {node.start_mark.line + 1}; expected {expected}")
    if node.tag != _TEXT:
        raise ValueError(f"has the tag {node.tag[:80]}; write the plain value without it")
    return Word(node.value, quoted=node.style is not None)
