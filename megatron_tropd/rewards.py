"""Rewards of finished responses: what a reward function is given, the one that comes along, and how a user's own is
found.

A reward function is any callable ``f(sample: RewardSample) -> float``.  It is named on the command line as
``package.module:function`` - the one import path this project reads, because a reward is the one part of a recipe
that belongs to the user's data and not to this package.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_tropd import evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSample:
    """One finished response."""

    prompt: str
    """As the model read it, special tokens left out."""
    response: str
    """Special tokens left out."""
    finished: bool
    """False where the response was cut off at --max-response-length."""
    answer: str | None
    """Reference answer of the row, where it has one."""
    domain: str
    answer_pattern: re.Pattern[str]
    """--answer-pattern."""


RewardFunction = Callable[[RewardSample], float]


def exact_match(sample: RewardSample) -> float:
    """1 where a finished response gives exactly the answer (group 1 of --answer-pattern), else 0.

    Raises:
        ValueError: the row has no answer.
    """
    if sample.answer is None:
        raise ValueError("the row has no answer to compare with; see --answer-key")
    return float(evaluation.exact_match(sample.response, sample.finished, sample.answer, sample.answer_pattern))


def load_reward_function(path: str) -> RewardFunction:
    """The callable that ``package.module:function`` names.

    Raises:
        ValueError: not such a path, or nothing callable is there; the message names the flag.
    """
    flag = f"--reward-function {path}"
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"{flag}: expected package.module:function, such as megatron_tropd.rewards:exact_match")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way
        raise ValueError(f"{flag}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        found = "is not there" if function is None else f"is a {type(function).__name__}, not a function"
        raise ValueError(f"{flag}: {name!r} {found} in {module_name}")
    return function
