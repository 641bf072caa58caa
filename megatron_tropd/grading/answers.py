"""Find the answer that a response gives."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
"""What matters to the nesting of LaTeX groups.  A backslash takes the next character with it: ``\\{`` is no group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer and its place in the response."""

    text: str
    """With each run of whitespace as one space, and none at the ends."""
    start: int
    """Index of its first character in the response."""


def find_answer(text: str, pattern: re.Pattern[str] | None) -> Answer | None:
    """Return the last answer in ``text``: group 1 of the last match of ``pattern``, or without a pattern the content of
    the last ``\\boxed{...}`` whose braces close.  None if there is no answer.

    A match that is empty, or in which group 1 takes no part, does not count.
    """
    found = _last_box(text) if pattern is None else _last_match(text, pattern)
    if found is None:
        return None
    start, end = found
    return Answer(text=normalized(text[start:end]), start=start)


def normalized(text: str) -> str:
    """Return ``text`` with each run of whitespace as one space, and none at the ends."""
    return " ".join(text.split())


def _last_match(text: str, pattern: re.Pattern[str]) -> tuple[int, int] | None:
    """Return the place of group 1 in the last match.  ``.*`` also matches nothing at the end of every text, which is
    why empty matches do not count."""
    last = None
    for match in pattern.finditer(text):
        if match.group() and match.group(1) is not None:
            last = match.span(1)
    return last


def _last_box(text: str) -> tuple[int, int] | None:
    """Return the place of the content of the last box that opens and closes; of nested boxes that is the inner one.

    One pass with a stack, so that the time is linear in the text whatever it contains.
    """
    last: tuple[int, int] | None = None
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
            if start >= 0 and (last is None or start > last[0]):
                last = start, token.start()
    return last


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
