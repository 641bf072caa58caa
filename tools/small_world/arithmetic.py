"""Chains of arithmetic modulo 7, and lessons that show how to work them out.

A problem reads ``3 a + 5 b * 2 c - 6 d + 1 ?``: start at 3, step a adds 5, step b doubles, and so on.  A
response works through the steps and ends with the last two values, ``# 2 3``.  Guessing is right once in 49.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from random import Random

from .language import (
    ANSWER,
    CONNECTIVES,
    DIGITS,
    EOS,
    EQUALS,
    FILLERS,
    LABELS,
    MODULUS,
    OPERATIONS,
    QUESTION,
    WORD_ID,
)

NUM_STEPS = 4
PROMPT_LEN = 2 + 3 * NUM_STEPS
MAX_RESPONSE_LEN = 10 * NUM_STEPS
"""A full response with its stop token has 7 * NUM_STEPS + 4 tokens; a filler after every step makes NUM_STEPS more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How lessons are written.  The default is that of the quickstart's teacher and student."""

    p_terse: float = 0.10
    """Chance that a response starts in the terse form, ``a 1 ,`` for ``a 3 + 5 = 1 ,``."""
    p_switch: float = 0.05
    """Chance, at every step, that the form changes."""
    p_dirty: float = 0.5
    """Share of the lessons that contain wrong results at all."""
    p_wrong: float = 0.15
    """Chance that a step of such a lesson has a wrong result."""
    wrong_taught: bool = False
    """Whether a wrong result is a target too, and not only context."""
    connective_weights: tuple[float, ...] = (0.55, 0.25, 0.15, 0.05)
    """Of the words that may end a step: ``CONNECTIVES``, then ``FILLERS`` as far as there are weights."""
    p_filler: float = 0.0
    """Chance that a filler, which means nothing, follows a step."""
    fillers_taught: bool = True
    """Whether a filler is a target, or only context for the tokens after it."""


USUAL = Style()


@dataclass(frozen=True, slots=True)
class Problem:
    """A start value and the (operation, operand) of every step."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        """The problem as it is asked."""
        chain = (f"{label} {sign} {operand}" for label, (sign, operand) in zip(LABELS, self.steps, strict=False))
        return " ".join([str(self.start), *chain, QUESTION])

    @property
    def answer(self) -> str:
        """The last two values of the chain."""
        values = [self.start]
        for sign, operand in self.steps:
            values.append(apply(values[-1], sign, operand))
        return f"{values[-2]} {values[-1]}"


@dataclass(frozen=True, slots=True)
class Lesson:
    """A response to imitate, and which of its tokens are targets."""

    token_ids: tuple[int, ...]
    taught: tuple[bool, ...]
    """False on what is context for the tokens after it, but no target: a wrong result, unless the style says else."""


def apply(value: int, sign: str, operand: int) -> int:
    """One step of a chain."""
    return {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % MODULUS


def draw_problems(rng: Random, count: int, seen: Collection[Problem] = frozenset()) -> list[Problem]:
    """``count`` different problems, none of which is in ``seen``."""
    drawn: dict[Problem, None] = {}
    while len(drawn) < count:
        steps = tuple((rng.choice(OPERATIONS), rng.randrange(MODULUS)) for _ in range(NUM_STEPS))
        problem = Problem(rng.randrange(MODULUS), steps)
        if problem not in seen:
            drawn[problem] = None
    return list(drawn)


def write_lesson(rng: Random, problem: Problem, style: Style = USUAL) -> Lesson:
    """A worked response, perhaps with wrong results; without fillers, which :func:`add_fillers` adds.

    After a wrong result all later steps, and the answer, continue from the value that was WRITTEN.  So a teacher
    learns the right next step whatever the student wrote before, which on-policy distillation depends on.
    """
    words: list[str] = []
    taught: list[bool] = []
    value = previous = problem.start
    terse = rng.random() < style.p_terse
    p_wrong = style.p_wrong if rng.random() < style.p_dirty else 0.0
    connectives = (*CONNECTIVES, *FILLERS)[: len(style.connective_weights)]
    for label, (sign, operand) in zip(LABELS, problem.steps, strict=False):
        if rng.random() < style.p_switch:
            terse = not terse
        result = apply(value, sign, operand)
        wrong = rng.random() < p_wrong
        if wrong:
            result = (result + rng.randrange(1, MODULUS)) % MODULUS
        working = [label] if terse else [label, DIGITS[value], sign, DIGITS[operand], EQUALS]
        words += [*working, DIGITS[result], rng.choices(connectives, style.connective_weights)[0]]
        taught += [True] * len(working) + [not wrong or style.wrong_taught, True]
        previous, value = value, result
    words += [ANSWER, DIGITS[previous], DIGITS[value], EOS]
    taught += [True] * 4
    return Lesson(tuple(WORD_ID[word] for word in words), tuple(taught))


def add_fillers(rng: Random, lesson: Lesson, style: Style) -> Lesson:
    """The lesson with a filler before some of the labels but the first, and before some of the answers."""
    begins_part = {WORD_ID[word] for word in (*LABELS, ANSWER)}
    token_ids: list[int] = []
    taught: list[bool] = []
    for token, target in zip(lesson.token_ids, lesson.taught, strict=True):
        if token_ids and token in begins_part and rng.random() < style.p_filler:
            token_ids.append(WORD_ID[rng.choice(FILLERS)])
            taught.append(style.fillers_taught)
        token_ids.append(token)
        taught.append(target)
    return Lesson(tuple(token_ids), tuple(taught))
