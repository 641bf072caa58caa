"""Cuts a server's most probable ids to the teacher's top-k, in its order.  Pure."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

SPARE = 8
"""Ids that are asked for beyond k: ids beyond the common vocabulary are dropped, and of ids with the same
log-probability at the end of the k those with the smallest numbers are kept, whichever the server sends first."""


def cut_top_k(
    ids: NDArray[Any], logprobs: NDArray[Any], *, top_k: int, vocab_size: int
) -> tuple[Tensor, Tensor] | None:
    """Return (ids int32, log-probabilities float32), [W, top_k] each, by (log-probability descending, id ascending).

    Args:
        ids: [W, n] in any order, n at least ``top_k``, no id twice in a row.
        logprobs: [W, n] of these ids.
        top_k: to return.
        vocab_size: ids from here on are dropped.

    Returns:
        None where fewer than ``top_k`` ids of some row are left.
    """
    id_WN, logprob_WN = torch.from_numpy(ids), torch.from_numpy(logprobs)
    order = id_WN.argsort(dim=1)
    id_WN, logprob_WN = id_WN.gather(1, order), logprob_WN.gather(1, order)
    logprob_WN = logprob_WN.masked_fill(id_WN >= vocab_size, -torch.inf)
    order = logprob_WN.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    id_WK, logprob_WK = id_WN.gather(1, order), logprob_WN.gather(1, order)
    if logprob_WK.isinf().any():
        return None
    return id_WK, logprob_WK
