"""The questions that prompts must not hold: word n-grams, and short questions as a whole.

A prompt collides with a question if they share ``ngram`` words in a row.  A question of fewer words collides if all of
it stands in the prompt (or is the prompt, with ``short_question="equal"``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_tropd.data.encoding.conversation import read_conversation
from megatron_tropd.data.encoding.fields import MISSING, lookup
from megatron_tropd.data.encoding.row_format import Fault
from megatron_tropd.data.reading.readers import read_span
from megatron_tropd.data.reading.rows import BadRow, PromptError, Row
from megatron_tropd.data.reading.spans import Span
from tools.prompt_preparation.drafts import Message
from tools.prompt_preparation.settings import DEFAULT_NGRAM, Settings, UsageError
from tools.prompt_preparation.sources import FoundFile, find_files
from tools.prompt_preparation.texts import words_of

_QUESTION_KEYS = ("question", "Question", "problem", "Problem", "question_content", "prompt")
"""Columns that hold the question in published benchmarks; the first that a file has is read."""
_FLAG = "--decontaminate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question of a benchmark."""

    place: str
    """File and line."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Collision:
    """A question that a prompt holds."""

    number: int
    """Position of the question among all."""
    words: str
    """The words that both have."""


class Benchmarks:
    """All questions, by the n-grams of their words.

    Words are numbers, and words that no question has are none: a prompt is cut there, and only the pieces that are long
    enough are looked up.
    """

    def __init__(
        self, questions: Iterable[Question], ngram: int = DEFAULT_NGRAM, short_question: str = "contained"
    ) -> None:
        self.questions = tuple(questions)
        self._equal = short_question == "equal"
        self._numbers: dict[str, int] = {}
        self._grams: dict[int, dict[tuple[int, ...], int]] = {}
        """By length: the question that a sequence of words is from, the first if there are several."""
        for number, question in enumerate(self.questions):
            ids = tuple(self._numbers.setdefault(word, len(self._numbers)) for word in words_of(question.text))
            size = min(ngram, len(ids))
            if size:
                grams = self._grams.setdefault(size, {})
                for start in range(len(ids) - size + 1):
                    grams.setdefault(ids[start : start + size], number)
        self._ngram = ngram
        self._words = tuple(self._numbers)

    def collision(self, messages: Sequence[Message]) -> Collision | None:
        """Return the first question that the prompt holds, longest sequences first; None if it holds none."""
        if not self._grams:
            return None
        words = words_of("\n".join(message["content"] for message in messages))
        pieces = list(self._pieces(words))
        for size in sorted(self._grams, reverse=True):
            whole_prompt = self._equal and size < self._ngram
            if whole_prompt and not (len(words) == size and pieces and len(pieces[0]) == size):
                continue
            for piece in pieces:
                for start in range(len(piece) - size + 1):
                    gram = piece[start : start + size]
                    number = self._grams[size].get(gram)
                    if number is not None:
                        return Collision(number=number, words=" ".join(self._words[word] for word in gram))
        return None

    def _pieces(self, words: Sequence[str]) -> Iterator[tuple[int, ...]]:
        """Yield the runs of words that the questions have too, as numbers."""
        run: list[int] = []
        for word in words:
            number = self._numbers.get(word)
            if number is not None:
                run.append(number)
            elif run:
                yield tuple(run)
                run = []
        if run:
            yield tuple(run)


def read_benchmarks(settings: Settings) -> tuple[Benchmarks, list[FoundFile]]:
    """Return the questions of --decontaminate, and the files that they are from.

    Raises:
        UsageError: a file is not there, or has no column of questions.
        PromptError: rows or files that cannot be read.
    """
    sources = [source for given in settings.decontaminate for source in find_files(given, _FLAG)]
    problems: list[BadRow] = []
    questions = [question for file in sources for question in _questions(file, settings.question_key, problems)]
    if problems:
        raise PromptError(problems)
    benchmarks = Benchmarks(
        questions, settings.ngram or DEFAULT_NGRAM, short_question=settings.short_question or "contained"
    )
    return benchmarks, sources


def _questions(file: FoundFile, key: str | None, problems: list[BadRow]) -> Iterator[Question]:
    columns = {key, key.partition(".")[0]} if key else set(_QUESTION_KEYS)
    count = 0
    for item in read_span(Span(file=file.file), columns):
        if isinstance(item, BadRow):
            problems.append(item)
            continue
        count += 1
        wanted = key or next((name for name in _QUESTION_KEYS if name in item.keys), "")
        value = lookup(item, wanted)
        if value is MISSING:
            found = ", ".join(item.keys) or "no columns"
            raise UsageError(
                f"{_FLAG} {file.name}:{item.line} has the columns {found}; expected "
                f"{key or 'one of ' + ', '.join(_QUESTION_KEYS)}: name the column of the question with --question-key"
            )
        yield Question(place=f"{file.name}:{item.line}", text=_text_of(item, value, problems))
    if not count and not problems:
        raise UsageError(f"{_FLAG} {file.name} has no rows; expected questions")


def _text_of(row: Row, value: object, problems: list[BadRow]) -> str:
    """Return a question that is a text or a list of messages as one text."""
    if isinstance(value, str) and words_of(value):
        return value
    try:
        text = "\n".join(str(message["content"]) for message in read_conversation(value).messages)
        if words_of(text):
            return text
        found, expected = "a question without words", "words"
    except Fault as fault:
        found, expected = fault.found.replace("prompt is", "the question is", 1), "a text or messages"
    problems.append(BadRow(path=row.path, line=row.line, found=found, expected=expected, flag="--question-key"))
    return ""
