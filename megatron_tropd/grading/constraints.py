"""The constraints of IFEval (arXiv 2311.07911) on a response, each a function of the text and the constraint's kwargs.

``CONSTRAINTS`` names them by IFEval's ids.  They run in a worker, where a text that takes too long follows nothing.
Where IFEval's own program uses nltk's models of sentences and words, there are rules here; ``docs/grading.md`` says
what differs.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

RELATIONS = ("less than", "at least")
_CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_BULLET = re.compile(r"[ \t]*(?:\*[^*]|-)")
_HIGHLIGHT = re.compile(r"\*[^\n*]*\*")
_DOUBLE_HIGHLIGHT = re.compile(r"\*\*[^\n*]*\*\*")
_PLACEHOLDER = re.compile(r"\[[^\]\n]*\]")
_WORD = re.compile(r"\w+")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]*_\u201d\u2019]*(?=\s|$)")
_ABBREVIATIONS = frozenset(
    [
        "mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "vs", "etc", "e.g", "i.e", "a.m", "p.m", "u.s", "u.k", "inc",
        "ltd", "co", "corp", "no", "vol", "fig", "approx", "dept", "est", "gen",
    ]
)  # fmt: skip
_FENCE = "```"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of constraint."""

    holds: Callable[..., bool]
    """(text, **kwargs) -> whether the text follows it."""
    kwargs: dict[str, type | tuple[str, ...]]
    """Of each argument: its type (``list`` is a list of texts), or the texts that it may be."""
    needs_language: bool = False
    """Whether it detects the language of the text, with the package langdetect."""


def _compared(count: int, limit: int, relation: str) -> bool:
    return count < limit if relation == RELATIONS[0] else count >= limit


def _occurrences(text: str, phrase: str) -> int:
    return text.lower().count(phrase.strip().lower())


def _existence(text: str, keywords: list[str]) -> bool:
    return all(_occurrences(text, keyword) for keyword in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compared(_occurrences(text, keyword), frequency, relation)


def _forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    lowered = text.lower()
    return not any(re.search(rf"\b{re.escape(word.strip().lower())}\b", lowered) for word in forbidden_words)


def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compared(text.lower().count(letter.strip().lower()), let_frequency, let_relation)


@cache
def _detector() -> Any:
    import langdetect

    langdetect.DetectorFactory.seed = 0  # it draws samples of a long text: the same in every process
    return langdetect


def load_languages() -> None:
    """Read the tables of the package langdetect, if it is there: that is not part of a question's time."""
    if importlib.util.find_spec("langdetect") is not None:
        _language("a text")


def _language(text: str) -> str | None:
    """Return the ISO 639-1 code of the language; None where the text has no letters to tell it by."""
    detector = _detector()
    try:
        return str(detector.detect(text))
    except detector.LangDetectException:
        return None


def _response_language(text: str, language: str) -> bool:
    return _language(text) in (language, None)


def _number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compared(count_sentences(text), num_sentences, relation)


def count_sentences(text: str) -> int:
    """Return the number of sentences: what ends with . ! or ? before whitespace, and a rest without such an end.

    The full stop after an abbreviation, a single capital letter or the number of a list entry ends no sentence.
    """
    count, start = 0, 0
    for match in _SENTENCE_END.finditer(text):
        words = text[start : match.start()].split()
        last = words[-1].lstrip("\"'([*_") if words else ""
        is_short = last.lower() in _ABBREVIATIONS or (len(last) == 1 and last.isupper() and last != "I")
        is_number = last.isdecimal() and len(words) == 1
        if match.group() == "." and (is_short or is_number):
            continue
        if words:
            count += 1
        start = match.end()
    return count + bool(text[start:].split())


def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs stand between dividers ``***``; only the first and the last may be empty, and do not count then."""
    parts = [bool(part.strip()) for part in text.split("***")]
    return all(parts[1:-1]) and sum(parts) == num_paragraphs


def _number_words(text: str, num_words: int, relation: str) -> bool:
    return _compared(len(_WORD.findall(text)), num_words, relation)


def _nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs stand between blank lines."""
    paragraphs = text.split("\n\n")
    filled = sum(bool(part.strip()) for part in paragraphs)
    if filled != num_paragraphs or not 1 <= nth_paragraph <= filled:
        return False
    words = paragraphs[nth_paragraph - 1].split()
    found = re.split(r"[.,?!'\"]", words[0].lstrip("'\""), maxsplit=1)[0] if words else ""
    return bool(found) and found.lower() == first_word.strip().lower()


def _number_placeholders(text: str, num_placeholders: int) -> bool:
    return len(_PLACEHOLDER.findall(text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    lowered, marker = text.lower(), postscript_marker.strip()
    if marker == "P.P.S":
        return re.search(r"p\.\s?p\.\s?s", lowered) is not None
    if marker == "P.S.":
        return re.search(r"p\.\s?s\.", lowered) is not None
    return marker.lower() in lowered


def _number_bullet_lists(text: str, num_bullets: int) -> bool:
    return sum(_BULLET.match(line) is not None for line in text.split("\n")) == num_bullets


def _constrained_response(text: str) -> bool:
    return any(choice in text for choice in _CHOICES)


def _number_highlighted_sections(text: str, num_highlights: int) -> bool:
    found = [*_HIGHLIGHT.findall(text), *_DOUBLE_HIGHLIGHT.findall(text)]
    return sum(bool(part.strip("*").strip()) for part in found) >= num_highlights


def _multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d", text)) >= num_sections


def _json_format(text: str) -> bool:
    body = text.strip()
    if body.startswith(_FENCE):
        body = body.removeprefix(_FENCE)
        body = body[4:] if body[:4].lower() == "json" else body
    try:
        json.loads(body.removesuffix(_FENCE))
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    """A title is a line's part between its first ``<<`` and its last ``>>``."""
    after = (line.partition("<<")[2] for line in text.split("\n"))
    return any(part.rpartition(">>")[0].strip("<> \t") for part in after)


def _two_responses(text: str) -> bool:
    """Two different texts with ``******`` between them; only the first and the last part may be empty."""
    parts = [part.strip() for part in text.split("******")]
    if not all(parts[1:-1]):
        return False
    filled = [part for part in parts if part]
    return len(filled) == 2 and filled[0] != filled[1]


def _repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    capital = [word for word in text.split() if word.isupper()]
    return _compared(len(capital), capital_frequency, capital_relation)


def _english_capital(text: str) -> bool:
    return text.isupper() and _language(text) in ("en", None)


def _english_lowercase(text: str) -> bool:
    return text.islower() and _language(text) in ("en", None)


def _no_comma(text: str) -> bool:
    return "," not in text


def _quotation(text: str) -> bool:
    return len(text.strip()) > 1 and text.strip().startswith('"') and text.strip().endswith('"')


CONSTRAINTS = {
    "change_case:capital_word_frequency": Kind(
        holds=_capital_word_frequency, kwargs={"capital_frequency": int, "capital_relation": RELATIONS}
    ),
    "change_case:english_capital": Kind(holds=_english_capital, kwargs={}, needs_language=True),
    "change_case:english_lowercase": Kind(holds=_english_lowercase, kwargs={}, needs_language=True),
    "combination:repeat_prompt": Kind(holds=_repeat_prompt, kwargs={"prompt_to_repeat": str}),
    "combination:two_responses": Kind(holds=_two_responses, kwargs={}),
    "detectable_content:number_placeholders": Kind(holds=_number_placeholders, kwargs={"num_placeholders": int}),
    "detectable_content:postscript": Kind(holds=_postscript, kwargs={"postscript_marker": str}),
    "detectable_format:constrained_response": Kind(holds=_constrained_response, kwargs={}),
    "detectable_format:json_format": Kind(holds=_json_format, kwargs={}),
    "detectable_format:multiple_sections": Kind(
        holds=_multiple_sections, kwargs={"section_spliter": str, "num_sections": int}
    ),
    "detectable_format:number_bullet_lists": Kind(holds=_number_bullet_lists, kwargs={"num_bullets": int}),
    "detectable_format:number_highlighted_sections": Kind(
        holds=_number_highlighted_sections, kwargs={"num_highlights": int}
    ),
    "detectable_format:title": Kind(holds=_title, kwargs={}),
    "keywords:existence": Kind(holds=_existence, kwargs={"keywords": list}),
    "keywords:forbidden_words": Kind(holds=_forbidden_words, kwargs={"forbidden_words": list}),
    "keywords:frequency": Kind(holds=_frequency, kwargs={"keyword": str, "frequency": int, "relation": RELATIONS}),
    "keywords:letter_frequency": Kind(
        holds=_letter_frequency, kwargs={"letter": str, "let_frequency": int, "let_relation": RELATIONS}
    ),
    "language:response_language": Kind(holds=_response_language, kwargs={"language": str}, needs_language=True),
    "length_constraints:nth_paragraph_first_word": Kind(
        holds=_nth_paragraph_first_word, kwargs={"num_paragraphs": int, "nth_paragraph": int, "first_word": str}
    ),
    "length_constraints:number_paragraphs": Kind(holds=_number_paragraphs, kwargs={"num_paragraphs": int}),
    "length_constraints:number_sentences": Kind(
        holds=_number_sentences, kwargs={"num_sentences": int, "relation": RELATIONS}
    ),
    "length_constraints:number_words": Kind(holds=_number_words, kwargs={"num_words": int, "relation": RELATIONS}),
    "punctuation:no_comma": Kind(holds=_no_comma, kwargs={}),
    "startend:end_checker": Kind(holds=_end_checker, kwargs={"end_phrase": str}),
    "startend:quotation": Kind(holds=_quotation, kwargs={}),
}
