"""Run by test_attention.py in a process of its own:

    python -m tests.no_waiting

runs the head and the teacher's head on tensors that say they are on a GPU and have no values (torch's fake tensors).  An
operation for which the host would have to wait for the device, such as nonzero() or float(), raises.  Prints one JSON
object: for each case ``runs ahead`` or ``waits``.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_tropd.objectives.methods import METHODS, ObjectiveSettings, make_objective
from megatron_tropd.ops import kernels, topk
from megatron_tropd.ops.vocab_parallel import HeadSettings, VocabShard, head_loss, unchecked_teacher_scores
from megatron_tropd.types import StepContext
from tests.dense import make_streams

TOKENS, VOCAB, HIDDEN, TOP_K = 24, 64, 8, 5


def _streams(needs):
    """Streams with everything that an objective may need."""
    zeros = torch.zeros(TOKENS)
    streams, _ = make_streams(num_tokens=TOKENS, vocab_size=VOCAB, top_k=TOP_K, seed=1)
    return replace(
        streams, reference_logprob_T=zeros, advantage_T=zeros, teacher_entropy_T=zeros,
        teacher_hidden_TH=torch.zeros(TOKENS, HIDDEN) if needs.divergence else None,
        old_logprob_T=zeros if needs.old_logprob else None, sample_start_T=zeros.bool(), sequence_error_T=zeros,
    )  # fmt: skip


def _head(name, mode, *, rows=True):
    objective = make_objective(name, ObjectiveSettings(top_k=TOP_K))
    needs = objective.needs
    streams = _streams(needs)
    shard = VocabShard(vocab_size=VOCAB, rows_per_rank=VOCAB // 2, group=dist.group.WORLD, chunk_tokens=7)
    with FakeTensorMode() as mode_of_tensors:
        streams = streams.map(mode_of_tensors.from_tensor)
        hidden = torch.zeros(TOKENS, 1, HIDDEN, requires_grad=True)
        weight = torch.zeros(VOCAB // 2, HIDDEN, requires_grad=True)
        out = head_loss(
            hidden, weight, streams, shard, objective, StepContext(entropy_threshold=0.5), sequence_parallel=False,
            settings=HeadSettings(mode=mode), rows=torch.arange(TOKENS) if rows else None,
            teacher_weight=torch.zeros(VOCAB // 2, HIDDEN) if needs.divergence else None,
        )  # fmt: skip
        out.loss.backward()


def _teacher():
    shard = VocabShard(vocab_size=VOCAB, rows_per_rank=VOCAB // 2, group=dist.group.WORLD, chunk_tokens=7)
    with FakeTensorMode(), torch.no_grad():
        hidden, weight = torch.zeros(TOKENS, HIDDEN), torch.zeros(VOCAB // 2, HIDDEN)
        labels = torch.zeros(TOKENS, dtype=torch.int64)
        unchecked_teacher_scores(hidden, weight, labels, shard, top_k=TOP_K, entropy=True)


def _outcome(case):
    try:
        case()
    except (DataDependentOutputException, DynamicOutputShapeException):
        return "waits"
    return "runs ahead"


def main():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    FakeTensor.is_cuda = property(lambda self: True)
    kernels.use_triton = lambda tensor: False
    topk.lowest_equals_ = lambda logits, values, columns: None  # a kernel on a GPU (tests/test_kernels.py)
    cases = {"teacher": _teacher, "negative control: rows looked for": lambda: _head("tropd", "one-pass", rows=False)}
    for name in METHODS:
        if make_objective(name, ObjectiveSettings(top_k=TOP_K)).needs.entropy_quantile is None:
            cases |= {f"{name}, {mode}": functools.partial(_head, name, mode) for mode in ("one-pass", "recompute")}
    print(json.dumps({name: _outcome(case) for name, case in cases.items()}))


if __name__ == "__main__":
    main()
