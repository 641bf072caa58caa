"""Chains of arithmetic modulo 7, and lessons that show how to work them out.

A problem reads ``3 a + 5 b * 2 c - 6 d + 1 ?``: start at 3, step a adds 5, step b doubles, and so on.  A
response works through the steps and ends with the last two values, ``# 2 3``.  Guessing is right once in 49.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from random import Random

from .language import ANSWER, CONNECTIVES, DIGITS, EOS, EQUALS, LABELS, MODULUS, OPERATIONS, QUESTION, WORD_ID

NUM_STEPS = 4
PROMPT_LEN = 2 + 3 * NUM_STEPS
MAX_RESPONSE_LEN = 10 * NUM_STEPS
"""A full response with its stop token has 7 * NUM_STEPS + 4 tokens."""

CONNECTIVE_WEIGHTS = (0.55, 0.25, 0.15, 0.05)
P_TERSE = 0.10
"""Chance that a response starts in the terse style, ``a 1 ,`` for ``a 3 + 5 = 1 ,``."""
P_SWITCH = 0.05
"""Chance, at every step, that the style changes."""
P_DIRTY = 0.5
"""Share of the lessons that contain wrong results at all."""
P_WRONG = 0.15
"""Chance that a step of such a lesson has a wrong result."""


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
    """False on a wrong result, which is context for the tokens after it, but never a target."""


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


def write_lesson(rng: Random, problem: Problem) -> Lesson:
    """A worked response, perhaps with wrong results.

    After a wrong result all later steps, and the answer, continue from the value that was WRITTEN.  So a teacher
    learns the right next step whatever the student wrote before, which on-policy distillation depends on.
    """
    words: list[str] = []
    taught: list[bool] = []
    value = previous = problem.start
    terse = rng.random() < P_TERSE
    p_wrong = P_WRONG if rng.random() < P_DIRTY else 0.0
    for label, (sign, operand) in zip(LABELS, problem.steps, strict=False):
        if rng.random() < P_SWITCH:
            terse = not terse
        result = apply(value, sign, operand)
        wrong = rng.random() < p_wrong
        if wrong:
            result = (result + rng.randrange(1, MODULUS)) % MODULUS
        working = [label] if terse else [label, DIGITS[value], sign, DIGITS[operand], EQUALS]
        words += [*working, DIGITS[result], rng.choices(CONNECTIVES, CONNECTIVE_WEIGHTS)[0]]
        taught += [True] * len(working) + [not wrong, True]
        previous, value = value, result
    words += [ANSWER, DIGITS[previous], DIGITS[value], EOS]
    taught += [True] * 4
    return Lesson(tuple(WORD_ID[word] for word in words), tuple(taught))
