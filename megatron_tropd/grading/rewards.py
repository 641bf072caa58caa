"""Reward functions: their argument, the built-in function ``exact_match``, and loading a user's own function.

A reward function is any callable ``f(sample: RewardSample) -> float``.  It is named on the command line as
``package.module:function``.  No other flag takes an import path: only the reward depends on the user's data.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from megatron_tropd.grading.grader import Grader


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSample:
    """One response to be rewarded."""

    prompt: str
    """Text of the prompt as the model read it, without special tokens."""
    response: str
    """Text of the response, without special tokens."""
    finished: bool
    """Whether the response ended with a stop token; False if it was cut off."""
    answer: str | None
    """Reference answer of the row; None if it has none."""
    domain: str
    grader: Grader
    """That of the row (--grader-key), or else of --grader and --answer-pattern."""


RewardFunction = Callable[[RewardSample], float]


def exact_match(sample: RewardSample) -> float:
    """Return 1 if a finished response gives the answer, by its grader as in evaluation; else 0.

    Raises:
        ValueError: the row has no answer.
    """
    if sample.answer is None:
        raise ValueError("the row has no answer to compare with; see --answer-key")
    return float(sample.grader.right(sample.response, sample.finished, sample.answer))


def load_reward_function(path: str) -> RewardFunction:
    """Import the callable that ``package.module:function`` names.

    Raises:
        ValueError: ``path`` has another form, the import failed, or nothing callable is there.
    """
    flag = f"--reward-function {path}"
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ValueError(
            f"{flag}: expected package.module:function, such as megatron_tropd.grading.rewards:exact_match"
        )
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way
        raise ValueError(f"{flag}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        found = "is not there" if function is None else f"is a {type(function).__name__}, not a function"
        raise ValueError(f"{flag}: {name!r} {found} in {module_name}")
    return function
