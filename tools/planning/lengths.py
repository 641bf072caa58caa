"""How long responses are, when only their mean R and their limit M are known.

The share of responses that are longer than t tokens is taken as

    s(t) = (1 - t / M) ** a,   a = M / R - 1

which has the right mean, integral of s from 0 to M = M / (a + 1) = R.  R = M / 2 is the uniform distribution; R near M
gives responses that nearly all reach the limit, and a small R a few long ones among many short.  The second moment is
E[L^2] = integral of 2 t s(t) = 2 M^2 / ((a + 1) (a + 2)).  This is an assumption about data: give the mean of a real
run.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of prompts and responses.

    Raises:
        ValueError: a mean is not above 0, or above its limit.
    """

    mean_prompt: float
    mean_response: float
    max_prompt: int
    max_response: int

    def __post_init__(self) -> None:
        for what, mean, limit in (
            ("prompt", self.mean_prompt, self.max_prompt), ("response", self.mean_response, self.max_response)
        ):  # fmt: skip
            if not 0 < mean <= limit:
                raise ValueError(
                    f"--mean-{what}-length {mean:g} must be above 0 and at most --max-{what}-length {limit}"
                )

    @property
    def exponent(self) -> float:
        """The exponent a."""
        return self.max_response / self.mean_response - 1

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_prompt + self.max_response

    @property
    def mean(self) -> float:
        """Tokens of a sequence, on average."""
        return self.mean_prompt + self.mean_response

    @property
    def mean_square_response(self) -> float:
        """E[L^2] of responses."""
        return 2 * self.max_response**2 / ((self.exponent + 1) * (self.exponent + 2))

    @property
    def mean_pairs(self) -> float:
        """Pairs of a token with itself or one before it in a sequence, on average; all prompts have the mean length."""
        square = self.mean_prompt**2 + 2 * self.mean_prompt * self.mean_response + self.mean_square_response
        return (square + self.mean) / 2

    def longer_than(self, tokens: float, *, aged: bool = False) -> float:
        """Return the share of responses that are longer than ``tokens``; with ``aged``, of responses that are being
        written at some moment, the share that goes on for longer: integral of s from ``tokens`` on / R."""
        if tokens >= self.max_response:
            return 0.0
        return float((1 - tokens / self.max_response) ** (self.exponent + aged)) if tokens > 0 else 1.0

    def mean_age(self, tokens: float) -> float:
        """Return the tokens that are written, on average, of a response that goes on for more than ``tokens`` at some
        moment of its writing: (M - t) / (a + 2)."""
        return (self.max_response - tokens) / (self.exponent + 2)
