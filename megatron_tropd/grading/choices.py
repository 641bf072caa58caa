"""The letter that a response to a multiple-choice question chooses.

A response states its choice in a box, ``\\boxed{C}``, or in words: ``the answer is (C)``, ``Answer: C``.  The last
statement counts.  One that names no letter or several (``\\boxed{42}``, ``Answer: B or C``) chooses nothing, and does
not give way to an earlier one.  All patterns take time that is linear in the text.
"""

from __future__ import annotations

import re

from megatron_tropd.grading.answers import boxes

LETTERS = "ABCDEFGHIJ"

_STATED = re.compile(
    r"\b(?:answer|choice|option)\b[*_\s]{0,8}(?::|=|\bis\b)[*_\s]{0,8}(?:(?:option|choice|letter)\b[*_\s]{0,8}|:)?",
    re.IGNORECASE,
)
"""What comes before a choice in words.  Bounded repetitions keep the search linear."""
_MARKS = r"[*_$\"'\s]{0,8}"
_FONT = r"(?:\\(?:text|textbf|mathrm|mathbf|rm|bf)\s{0,8}\{|\\[(\[])?"
_OPEN = re.compile(rf"{_MARKS}{_FONT}{_MARKS}(?P<bracket>[(\[{{]\s{{0,8}})?")
_AFTER = re.compile(r"[*_$\s)\]}\"'.\\]{0,8}")
_ANOTHER = re.compile(r"(?:(?:/|&|\bor\b|\band\b)[*_$\s(\[]{0,8}[A-J]|,[*_$\s(\[]{0,8}[A-J](?! [a-z]))(?![\w'])")
"""A second letter; after a comma only one that begins no clause, as in ``B, A is wrong``."""
_PART_OF_MORE = re.compile(r"[\w^+#]|['\u2019]\w|\\(?![)\]])")
_WORD = re.compile(r" (?!(?:because|since|as|for)\b)[a-z]|['\u2019]")
"""After a capital A or I, a sign of the article or the pronoun."""
_IN_BOX = re.compile(rf"{_MARKS}{_FONT}{_MARKS}[(\[]?\s?(?P<letter>[A-Ja-j])(?:[*_$\s]{{0,8}}$|[)\].:}}](?![A-Za-z]))")
_STANDALONE = re.compile(r"(?<![A-Za-z0-9_'\\])[A-J](?![A-Za-z0-9_'\u2019+#])")


def find_choice(text: str, *, lenient: bool) -> tuple[str, int] | None:
    """Return the letter A to J that ``text`` chooses and its index; None if it chooses none.

    ``lenient`` takes the last capital letter that stands alone where no statement is made at all; the pronoun I and the
    article A are no such letters.
    """
    stated: list[tuple[int, str] | None] = [_in_box(text, start, end) for start, end in boxes(text)]
    stated += [_in_words(text, match.end()) for match in _STATED.finditer(text)]
    if made := [one for one in stated if one is not None]:
        place, letter = max(made)
        return (letter, place) if letter else None
    if lenient:
        for match in reversed(list(_STANDALONE.finditer(text))):
            if match.group() not in "AI" or not _WORD.match(text, match.end()):
                return match.group(), match.start()
    return None


def _in_box(text: str, start: int, end: int) -> tuple[int, str]:
    """Return the letter in a box and its place; "" if there is none or more than one.  After it may stand the text of
    the option."""
    match = _IN_BOX.match(text, start, end)
    if match is None or _names_another(text, match.end("letter"), end):
        return start, ""
    return match.start("letter"), match["letter"].upper()


def _in_words(text: str, start: int) -> tuple[int, str] | None:
    """Return the letter that stands at ``start`` and its place, with "" if several do; None if none stands alone."""
    opened = _OPEN.match(text, start)
    assert opened is not None  # it matches nothing, too
    place = opened.end()
    letter = text[place : place + 1]
    if opened["bracket"]:
        letter = letter.upper()
    if not letter or letter not in LETTERS or _PART_OF_MORE.match(text, place + 1):
        return None
    if letter in "AI" and not opened["bracket"] and _WORD.match(text, place + 1):
        return None  # "the answer is a good one", with a capital
    return place, "" if _names_another(text, place + 1, len(text)) else letter


def _names_another(text: str, start: int, end: int) -> bool:
    """Return whether the letter before ``start`` is followed by a second one before ``end``, as in ``B or C``."""
    after = _AFTER.match(text, start, end)
    assert after is not None  # it matches nothing, too
    return _ANOTHER.match(text, after.end(), end) is not None
