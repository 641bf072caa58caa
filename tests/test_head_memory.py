"""Bytes of the head, counted exactly: they gate what CI lets in."""

from __future__ import annotations

import pytest
import torch

VOCAB, HIDDEN, CHUNK, TOP_K = 4999, 16, 32, 64


def _peaks(modes, dtype, counts):
    """{mode: [peak bytes beyond inputs and returned gradients, for each number of tokens]}."""
    import torch.distributed as dist

    from tools.head_benchmark.contenders import NAIVE, Contender, ours
    from tools.head_benchmark.inputs import Sizes
    from tools.head_benchmark.measure import memory

    assert dist.get_world_size() == 1
    found = {}
    for mode in modes:
        contender = NAIVE if mode == "naive" else Contender(name=mode, loss="TrOPD", run=ours(mode))
        found[mode] = [
            memory(
                contender,
                Sizes(tokens=count, hidden=HIDDEN, vocab=VOCAB, chunk=CHUNK, top_k=TOP_K, dtype=dtype),
                torch.device("cpu"),
            )
            for count in counts
        ]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_of_tokens_times_vocabulary_is_kept(ranks, measured, dtype):
    counts = [256, 512]
    (peaks,) = ranks(1).run(_peaks, ["one-pass", "recompute", "single-chunk"], dtype, counts)
    slopes = {mode: (more - fewer) / ((counts[1] - counts[0]) * VOCAB) for mode, (fewer, more) in peaks.items()}
    for mode in ("one-pass", "recompute"):
        measured(f"head, {mode}: extra bytes per token and vocabulary column", slopes[mode], 0.1)
    # Negative control: one chunk of all tokens keeps one number for each.
    assert slopes["single-chunk"] > 0.9 * torch.finfo(dtype).bits / 8
    # A chunk of logits, fp32 copies of a block of it, and the weight gradient in fp32.
    assert peaks["one-pass"][1] < 9 * CHUNK * VOCAB + 4 * VOCAB * HIDDEN + 6e6


def test_a_tenth_of_naive_at_32_chunks(ranks):
    (peaks,) = ranks(1).run(_peaks, ["one-pass", "naive"], torch.float32, [32 * CHUNK])
    assert 10 * peaks["one-pass"][0] <= peaks["naive"][0], peaks
    assert peaks["naive"][0] > 12 * 32 * CHUNK * VOCAB, "naive holds less than three fp32 copies: is it counted?"
