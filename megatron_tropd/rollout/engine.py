"""The interface of every rollout engine, and the checks that all of them share.

An engine FAILS CLOSED: it generates only with a whole set of weights, delivered by
``begin_update`` .. ``update`` .. ``end_update`` without one tensor missing, unknown, repeated or of
another shape.  Anything else raises :class:`EngineError`, so no token is written with unknown weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from megatron_tropd.errors import EngineError
from megatron_tropd.rng import Stream
from megatron_tropd.types import Counts, GenerationRequest, Rollout

Arrived = Callable[[Mapping[int, Rollout]], None]
"""Is told of finished rollouts, by the index of their request, on the rank where they arrive.  It may be called from
any thread, must return soon, and is called once for every request."""


def ignore(_: Mapping[int, Rollout]) -> None:
    """An :data:`Arrived` for rollouts that nobody waits for one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to draw tokens.

    Engines with named random numbers (the embedded engine; rng.py) read ``seed``, ``stream`` and ``step``, so their
    tokens do not depend on batches or ranks.  SGLang servers draw with random numbers of their own.
    """

    temperature: float = 1.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    report_top_k: int = 0
    """Number of the model's own most probable ids to report at every place (``Rollout.topk_ids``)."""
    seed: int
    stream: Stream = Stream.SAMPLING
    step: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; expected a finite number >= 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected a number in (0, 1]")


@runtime_checkable
class RolloutEngine(Protocol):
    """Writes continuations with the student's weights.

    An update is ``begin_update(v)``, any number of ``update(...)`` calls that together deliver every
    tensor of the HF checkpoint once, ``end_update(v)``.  After a failure anywhere in it the engine
    refuses to generate until a later update, begun afresh, succeeds as a whole.
    """

    @property
    def weight_version(self) -> int | None:
        """Version of the loaded weights; None while they are incomplete."""

    @property
    def written(self) -> Counts | None:
        """Finished responses of the current or last call of :meth:`generate`; None before the first.  May be read by
        another thread."""

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, arrived: Arrived = ignore
    ) -> list[Rollout]:
        """Return one rollout for each request, in the same order.  Equal requests give equal rollouts.

        ``arrived`` is told of rollouts as they finish, by the index of their request.

        Raises:
            EngineError: no whole set of weights is loaded, a request is malformed, or the engine failed.
        """

    def begin_update(self, version: int) -> None:
        """Stop serving the old weights and expect those of ``version``."""

    def update(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load (HF name, tensor) pairs; raises EngineError on the first unexpected one."""

    def end_update(self, version: int) -> None:
        """Serve ``version`` from now on; raises EngineError if a tensor is missing."""

    def health(self) -> None:
        """Raise EngineError, saying why, if ``generate`` would be refused now."""

    def close(self) -> None:
        """Free the engine's memory.  It cannot be used afterwards."""


def check_requests(requests: Sequence[GenerationRequest], *, vocab_size: int, max_positions: int) -> None:
    """Refuse requests that would index outside the model or its positions.

    Raises:
        EngineError: naming the prompt and what is wrong with it.
    """
    for request in requests:
        name = f"request of prompt {request.prompt_uid}, sample {request.sample_index}"
        length = len(request.token_ids)
        if request.prompt_len < 1 or request.guidance_len < 0 or request.prompt_len + request.guidance_len != length:
            raise EngineError(
                f"{name}: prompt_len {request.prompt_len} + guidance_len {request.guidance_len} "
                f"is not its {length} tokens"
            )
        if not (min(request.token_ids) >= 0 and max(request.token_ids) < vocab_size):
            raise EngineError(f"{name}: a token id is outside [0, {vocab_size}); use the student's own tokenizer")
        if request.max_new_tokens < 0:
            raise EngineError(f"{name}: max_new_tokens {request.max_new_tokens} is negative")
        if length + request.max_new_tokens > max_positions:
            raise EngineError(
                f"{name}: {length} given + {request.max_new_tokens} new tokens exceed the model's "
                f"max_position_embeddings {max_positions}; lower --max-prompt-length or --max-response-length"
            )
