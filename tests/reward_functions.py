"""Reward functions as a user would bring them."""

from __future__ import annotations

import os
import time
from pathlib import Path


def third_of_length(sample):
    """Depends on the whole response, so that most groups differ."""
    return (len(sample.response.split()) % 3) / 3 + 0.1 * sample.finished


def same_for_all(sample):
    return 1.0


def fails_on_a_word(sample):
    return 1 / (sample.prompt.count("w3") - 1)


def not_a_number(sample):
    return float("nan")


def astronomic(sample):
    return 1e9 * third_of_length(sample)


a_number = 3


def last_word(sample):
    """The number in the last word (w50 is 50)."""
    digits = "".join(c for c in sample.response.split(" ")[-1] if c.isdigit())
    return float(digits or 0)


def when_the_gate_opens(sample):
    """1, as soon as the file that REWARD_GATE names exists."""
    deadline = time.monotonic() + 120
    while not Path(os.environ["REWARD_GATE"]).exists():
        assert time.monotonic() < deadline, "nobody opened the gate"
        time.sleep(0.02)
    return 1.0
