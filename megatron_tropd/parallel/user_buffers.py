"""Transformer Engine's userbuffers, in which --tp-comm-overlap sends tensor-parallel messages while products run."""

from __future__ import annotations


def initialize(*, tokens: int, hidden_size: int, tp: int, backend: str) -> None:
    """Allocate the buffers, once, before the first layer is built.  Collective over the world; needs a GPU.

    Args:
        tokens: packed tokens of every micro-batch on a rank; Transformer Engine takes no other number.
        hidden_size: width of the hidden states.
        tp: tensor-parallel ranks.
        backend: over which the ranks meet: nccl, mpi or gloo.
    """
    from transformer_engine.pytorch.module.base import initialize_ub

    initialize_ub(shape=[tokens, hidden_size], tp_size=tp, bootstrap_backend=backend)
