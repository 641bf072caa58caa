"""Writes responses with a small model, and counts right answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .arithmetic import MAX_RESPONSE_LEN, Problem
from .language import ANSWER_PATTERN, EOS_ID, PAD_ID, UNK_ID, decode, encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How the next token is chosen, and how often every prompt is answered in an evaluation."""

    name: str
    greedy: bool = False
    top_p: float = 1.0
    num_samples: int = 1


GREEDY = Decoding(name="greedy", greedy=True)
TOP_P = Decoding(name="top_p_0.7", top_p=0.7, num_samples=2)
TEMPERATURE_1 = Decoding(name="temperature_1")
DECODINGS = (GREEDY, TOP_P, TEMPERATURE_1)


@torch.no_grad()
def write_responses(
    model: PreTrainedModel, prompts: Tensor, decoding: Decoding, generator: torch.Generator | None = None
) -> list[list[int]]:
    """One response per row of ``prompts`` [batch, length]; a finished one ends in EOS.

    All prompts of this world have the same length, so nothing is padded and no mask is needed.
    """
    written = torch.full((len(prompts), MAX_RESPONSE_LEN), PAD_ID)
    done = torch.zeros(len(prompts), dtype=torch.bool)
    tokens, cache = prompts, None
    for position in range(MAX_RESPONSE_LEN):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        token = _choose(output.logits[:, -1].float(), decoding, generator).masked_fill(done, PAD_ID)
        written[:, position] = token
        done |= token == EOS_ID
        if done.all():
            break
        tokens = token[:, None]
    return [_strip(row) for row in written.tolist()]


def _choose(logits: Tensor, decoding: Decoding, generator: torch.Generator | None) -> Tensor:
    logits[:, [PAD_ID, UNK_ID]] = -torch.inf  # never taught, and decoding would drop them from the text
    if decoding.greedy:
        return logits.argmax(-1)
    probabilities = logits.softmax(-1)
    if decoding.top_p < 1:
        probabilities, ids = probabilities.sort(-1, descending=True)
        before = probabilities.cumsum(-1) - probabilities
        chosen = torch.multinomial(probabilities * (before < decoding.top_p), 1, generator=generator)
        return ids.gather(-1, chosen)[:, 0]
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _strip(row: list[int]) -> list[int]:
    return row[: row.index(EOS_ID) + 1] if EOS_ID in row else row


def is_right(response: Sequence[int], answer: str) -> bool:
    """Whether a response ended by itself and everything after its first ``#`` is the answer."""
    found = re.search(ANSWER_PATTERN, decode(list(response)))
    return response[-1] == EOS_ID and found is not None and found[1] == answer


def prompt_batch(problems: Sequence[Problem]) -> Tensor:
    """Token ids of the prompts, [len(problems), PROMPT_LEN]."""
    return torch.tensor([encode(problem.prompt) for problem in problems])


def accuracy(
    model: PreTrainedModel, problems: Sequence[Problem], decoding: Decoding, seed: int, batch_size: int = 512
) -> float:
    """Share of right responses, over ``decoding.num_samples`` responses per problem."""
    generator = torch.Generator().manual_seed(seed)
    asked = [problem for problem in problems for _ in range(decoding.num_samples)]
    right = 0
    for first in range(0, len(asked), batch_size):
        batch = asked[first : first + batch_size]
        responses = write_responses(model, prompt_batch(batch), decoding, generator)
        right += sum(is_right(response, problem.answer) for response, problem in zip(responses, batch, strict=True))
    return right / len(asked)
