"""The order in which a run takes its prompts: epoch after epoch, shuffled by the seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypedDict

import numpy as np

from megatron_tropd import rng
from megatron_tropd.atomic_files import replacing
from megatron_tropd.data.prompts import PromptSet, digest
from megatron_tropd.types import Prompt

_IN_MEMORY = 1 << 20
"""Rows up to which the order of an epoch is kept in memory; that of more rows is a file of the token cache."""


class CursorState(TypedDict):
    """The state of a PromptSource in a checkpoint."""

    consumed: int
    digest: str


class PromptSource:
    """An endless sequence of prompts, epoch after epoch; its only state is ``consumed``, the number of prompts taken.

    Example:
        >>> source = PromptSource([Prompt(uid=7, token_ids=(1,))], seed=0)
        >>> [prompt.uid for prompt in source.take(2)], source.consumed
        ([7, 7], 2)
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True) -> None:
        if not prompts:
            raise ValueError("a prompt source needs at least one prompt; see --prompt-data")
        self._prompts = prompts
        self._directory = prompts.directory if isinstance(prompts, PromptSet) else None
        self._seed = seed
        self._shuffle = shuffle
        self._digest = digest(prompts)
        self.consumed = 0

    @property
    def epoch(self) -> int:
        """Number of complete passes over the prompts."""
        return self.consumed // len(self._prompts)

    def take(self, n: int) -> list[Prompt]:
        """Return the next ``n`` prompts.  They may cross the end of an epoch and so hold a prompt twice."""
        if n < 1:
            raise ValueError(f"take({n}): expected at least 1 prompt")
        size = len(self._prompts)
        taken: list[Prompt] = []
        for index in range(self.consumed, self.consumed + n):
            epoch, place = divmod(index, size)
            if self._shuffle:
                place = int(_order(self._seed, epoch, size, self._directory)[place])
            taken.append(self._prompts[place])
        self.consumed += n
        return taken

    def state_dict(self) -> CursorState:
        """Return the number of prompts taken and the digest of the prompts."""
        return {"consumed": self.consumed, "digest": self._digest}

    def load_state_dict(self, state: CursorState) -> None:
        """Continue from the position at which ``state`` was taken.

        Raises:
            ValueError: the prompts are not those of the checkpoint, or its number of prompts taken is negative.
        """
        if state["digest"] != self._digest:
            raise ValueError(
                f"the prompts changed since the checkpoint (digest {state['digest'][:12]} then, {self._digest[:12]} "
                "now): restore the files, tokenizer and limits given by --prompt-data, --prompt-key, "
                "--response-key, --apply-chat-template, --max-prompt-length, --max-response-length and --on-bad-row, "
                "or start a new run (another --save directory) from the checkpoint's weights"
            )
        if state["consumed"] < 0:
            raise ValueError(f"prompt cursor {state['consumed']} in the checkpoint; expected 0 or more")
        self.consumed = state["consumed"]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int, directory: Path | None) -> np.ndarray:
    """Return the order of one epoch, [size].  A large one is computed once for all ranks and mapped into memory."""
    path = directory / f"order-{seed}-{epoch}.npy" if directory and size > _IN_MEMORY else None
    if path is None or not path.is_file():
        order = rng.permutation(rng.key(seed, rng.Stream.SHUFFLE, epoch), size).numpy()
        if path is None:
            return order
        try:
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, order)
        except OSError:  # a cache that someone else made and this user may only read
            return order
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]
