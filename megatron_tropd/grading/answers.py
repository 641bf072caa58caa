"""Find the part of a response that counts, and the answer in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_tropd.data.encoding.thinking import TAGS

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
"""What matters to the nesting of LaTeX groups.  A backslash takes the next character with it: ``\\{`` is no group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer and its place in the response."""

    text: str
    start: int
    """Index of its first character in the response."""


def after_thinking(response: str) -> Answer | None:
    """Return what a response says after its last tag that ends a thought, without whitespace at its ends.

    That is all of a response without such tags.  A response that begins with a thought and does not end it says
    nothing: None.
    """
    start = max((place + len(tag) for _, tag in TAGS if (place := response.rfind(tag)) >= 0), default=0)
    if not start and response.lstrip().startswith(tuple(tag for tag, _ in TAGS)):
        return None
    said = response[start:].strip()
    return Answer(text=said, start=response.index(said, start)) if said else None


def last_box(text: str) -> tuple[int, int] | None:
    """Return the place of the content of the last ``\\boxed{...}`` whose braces close; of nested ones, the inner."""
    return max(boxes(text), default=None)


def normalized(text: str) -> str:
    """Return ``text`` with each run of whitespace as one space, and none at the ends."""
    return " ".join(text.split())


def last_match(text: str, pattern: re.Pattern[str]) -> tuple[int, int] | None:
    """Return the place of group 1 in the last match of ``pattern``.

    A match that is empty, or in which group 1 takes no part, does not count: ``.*`` also matches nothing at the end of
    every text.
    """
    last = None
    for match in pattern.finditer(text):
        if match.group() and match.group(1) is not None:
            last = match.span(1)
    return last


def boxes(text: str) -> Iterator[tuple[int, int]]:
    """Yield the place of the content of every ``\\boxed{...}`` whose braces close, in the order of their ends.

    One pass with a stack, so that the time is linear in the text whatever it contains.
    """
    open_groups: list[int] = []
    """Start of the content of every open box; -1 for any other open group."""
    for token in _BRACES.finditer(text):
        kind = token.group()
        if kind == "{":
            open_groups.append(-1)
        elif kind.endswith("{") and kind != r"\{":
            open_groups.append(token.end())
        elif kind == "}" and open_groups:
            start = open_groups.pop()
            if start >= 0:
                yield start, token.start()


def braces_balance(text: str) -> bool:
    """Return whether every LaTeX group that ``text`` opens closes, and the other way round."""
    depth = 0
    for token in _BRACES.finditer(text):
        kind = token.group()
        if kind == "}":
            depth -= 1
            if depth < 0:
                return False
        elif kind == "{" or kind.startswith(r"\boxed"):
            depth += 1
    return depth == 0
