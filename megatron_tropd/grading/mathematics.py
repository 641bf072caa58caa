"""Whether two answers are equal as text or as mathematics; what math-verify misreads is decided here."""

from __future__ import annotations

import re
from collections.abc import Callable

from megatron_tropd.grading.answers import normalized

MAX_LENGTH = 1000
"""Characters; a longer answer is compared as text only, because the time of a parser is more than linear in it."""

_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\{([^{}\\]*)\}")
_WORDS = re.compile(r"[^\W\d_]{4,}|[^\W\d_]+(?:[ -][^\W\d_]+)+")
"""A word of more than three letters, or several words.  math-verify reads it as a product of letters: east = eats."""
_THIN_SPACE = re.compile(r"(?<=\d)\\[,;:!](?=\d{3}(?!\d))")
"""Between groups of digits, as in ``1\\,024``; math-verify reads it as an end."""
_SEVERAL_NUMBERS = re.compile(r"[-+]?[\d.,]+(?: [-+]?[\d.,]+)+")
"""math-verify reads ``1 2`` as the mixed number 1 + 2, which is ``2 1`` too."""


def equal(answer: str, reference: str, ask: Callable[[str, str], bool]) -> bool:
    """Return whether ``answer`` equals ``reference``, both normalized.

    ``ask`` is math-verify; it is asked only about texts that it reads as what they mean.
    """
    answer, reference = _plain(answer), _plain(reference)
    if answer == reference or not answer:
        return answer == reference
    if any(_WORDS.fullmatch(text) for text in (answer, reference)):
        return answer.casefold() == reference.casefold()
    if any(_SEVERAL_NUMBERS.fullmatch(text) or len(text) > MAX_LENGTH for text in (answer, reference)):
        return False
    return ask(answer, reference)


def _plain(text: str) -> str:
    """Return ``text`` without dollar signs around it, ``\\text{...}`` around all of it, a full stop at its end and thin
    spaces between its digits."""
    text = text.strip("$ ")
    if wrapped := _WRAPPED.fullmatch(text):
        text = wrapped.group(1)
    return normalized(_THIN_SPACE.sub("", text.removesuffix(".")))
