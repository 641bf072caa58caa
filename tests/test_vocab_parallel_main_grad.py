"""The head under Megatron's DDP: the weight's gradient reaches ``main_grad`` in backward, in fp32, once."""

from __future__ import annotations

import contextlib

import pytest
import torch

from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.types import StepContext
from tests.dense import make_streams, tropd_losses
from tests.head_methods import BETA, HEAD_METHODS

VOCAB, HIDDEN, TOKENS, TOP_K = 331, 16, 48, 8


def _tables(tied):
    generator = torch.Generator().manual_seed(5)
    embedding = torch.randn(VOCAB, HIDDEN, generator=generator).bfloat16()
    return embedding, embedding if tied else torch.randn(VOCAB, HIDDEN, generator=generator).bfloat16()


def _batch(index):
    streams, _ = make_streams(num_tokens=TOKENS, vocab_size=VOCAB, top_k=TOP_K, seed=10 + index)
    return torch.arange(TOKENS) * (3 + index) % VOCAB, streams


def _wrapped(tied, overlap):
    """(DDP, embedding, output table): a model of an embedding and a head."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import MegatronModule, TransformerConfig

    class Tables(MegatronModule):
        def __init__(self):
            super().__init__(
                TransformerConfig(
                    num_layers=1, hidden_size=HIDDEN, num_attention_heads=1, calculate_per_token_loss=True, bf16=True,
                    params_dtype=torch.bfloat16,
                )
            )  # fmt: skip
            embedding, table = _tables(tied)
            self.embedding = torch.nn.Parameter(embedding.clone())
            if tied:
                self.table = self.embedding
                self.table.zero_out_wgrad = True  # as GPTModel marks a table that is tied on one stage
            else:
                self.table = torch.nn.Parameter(table.clone())

        def forward(self, ids):
            return torch.nn.functional.embedding(ids, self.embedding)[:, None]

    model = Tables()
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, use_distributed_optimizer=False
    )
    return DistributedDataParallel(model.config, settings, model), model


def _train(dp, tied, mode, overlap):
    """main_grad of the output table after two micro-batches on every data-parallel rank."""
    from megatron_tropd.ops.vocab_parallel import HeadSettings, VocabShard, head_loss
    from megatron_tropd.parallel.groups import student_groups

    groups = student_groups(ParallelLayout(tp=1, dp=dp))
    ddp, model = _wrapped(tied, overlap)
    shard = VocabShard(vocab_size=VOCAB, rows_per_rank=VOCAB, group=groups.pg_collection.tp, chunk_tokens=10)
    ddp.zero_grad_buffer()
    for step in range(2):
        ids, streams = _batch(2 * groups.coords.dp + step)
        before = model.table.main_grad.clone()
        with contextlib.nullcontext() if step == 1 else ddp.no_sync():
            out = head_loss(
                ddp(ids), model.table, streams, shard, HEAD_METHODS["tropd"].make(TOP_K), StepContext(),
                sequence_parallel=False, settings=HeadSettings(mode=mode, logits_dtype=torch.float32),
            )  # fmt: skip
            assert torch.equal(model.table.main_grad, before), "a gradient before backward"
            out.loss.backward()
        assert model.table.grad is None and model.table.grad_added_to_main_grad
        assert model.table.main_grad.dtype == torch.float32
    ddp.finish_grad_sync()
    return model.table.main_grad


def _oracle(dp, tied):
    embedding, table = (value.double().requires_grad_() for value in _tables(tied))
    if tied:
        table = embedding
    for index in range(2 * dp):
        ids, streams = _batch(index)
        tropd_losses(embedding[ids] @ table.t(), streams, beta=BETA).sum().backward()
    return table.grad


@pytest.mark.parametrize("mode", ["one-pass", "recompute"])
@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlapped"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_main_grad_is_the_gradient(ranks, measured, tied, overlap, mode):
    dp = 2
    expected = _oracle(dp, tied)
    # The embedding's own gradient reaches a tied table through bf16, as in any Megatron model.
    limit = 2**-7 if tied else 2e-6
    for grad in ranks(dp).run(_train, dp, tied, mode, overlap):
        error = float((grad.double() - expected).norm() / expected.norm())
        measured(
            f"bf16 model under DDP, fp32 logits: main_grad of the head ({'tied' if tied else 'untied'})", error, limit
        )
