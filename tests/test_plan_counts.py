"""What tools/planning counts against the real thing: models, optimizers and passes that are built and run here."""

from __future__ import annotations

import gc
import json
import random
from dataclasses import replace

import pytest
import torch

from megatron_tropd.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.types import Rollout, ScoreRequest
from tests.weight_cases import arch
from tools.acceptance.shapes import TINY
from tools.planning.activations import PassShape, forward_bytes, layer_bytes, repeated, training_bytes
from tools.planning.caches import head_bytes, kv_bytes, score_bytes, score_text_bytes
from tools.planning.parameters import model_parameters, rank_parameters, training_state

SPARSE = replace(
    TINY, family="qwen3_moe", num_experts=8, moe_intermediate_size=48, num_experts_per_tok=2, norm_topk_prob=True,
    tie_word_embeddings=False,
)  # fmt: skip
LAYOUTS = {
    "tensor and pipeline, tied": (arch(tied=True), {"tp": 2, "pp": 2}),
    "tensor, biased": (arch("qwen2"), {"tp": 4}),
    "pipeline of replicas": (arch("llama"), {"pp": 2, "dp": 2}),
    "experts on every rank": (arch("qwen3_moe"), {"tp": 2, "dp": 2, "ep": 4, "etp": 1}),
    "experts and pipeline": (arch("qwen3_moe"), {"pp": 2, "dp": 2, "ep": 2}),
}


def _real_parameters(model, layout):
    import torch.distributed as dist

    from megatron_tropd.models.build import build_gpt_model
    from megatron_tropd.parallel.groups import teacher_groups

    built = dict(build_gpt_model(model, teacher_groups(layout)).named_parameters())
    experts = sum(value.numel() for name, value in built.items() if ".experts." in name)
    return layout.coords(dist.get_rank()).pp, sum(value.numel() for value in built.values()) - experts, experts


@pytest.mark.parametrize("case", LAYOUTS)
def test_parameters_of_a_rank_are_those_of_megatrons_model(ranks, case):
    model, sizes = LAYOUTS[case]
    layout = ParallelLayout(**sizes, make_vocab_size_divisible_by=16)
    for stage, dense, experts in ranks(4).run(_real_parameters, model, layout):
        counted = rank_parameters(model, layout, stage)
        assert (counted.dense, counted.experts) == (dense, experts)


def _student(arch, layout, **config):
    from megatron_tropd.parallel.groups import student_groups
    from megatron_tropd.training.student import Student, build_student

    settings, groups = TrainConfig(**config), student_groups(layout)
    return Student(build_student(settings, arch, groups), groups, settings, vocab_size=arch.vocab_size)


def _distinct_bytes(tensors, apart_from=()):
    known = {tensor.untyped_storage().data_ptr() for tensor in apart_from}
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for place, size in found.items() if place not in known)


def _real_state(model, layout, bf16, distributed):
    """(bytes of weights, gradients, optimizer state; number of parameters) of this rank."""
    from megatron_tropd.parallel import platform

    parallel = ParallelConfig(
        tensor_model_parallel_size=layout.tp, use_distributed_optimizer=distributed, sequence_parallel=layout.tp > 1
    )
    student = _student(model, layout, model=ModelConfig(bf16=bf16), parallel=parallel)
    platform.prime_adam_state(student.optimizer)
    weights = list(student.model.parameters())
    buffers = [b for chunk in student.ddp for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    inner = [part.optimizer for part in student._optimizers if part.optimizer is not None]
    held = [p for o in inner for group in o.param_groups for p in group["params"]]
    held += [
        value
        for o in inner
        for state in o.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.dim()
    ]
    found = (
        sum(weight.nbytes for weight in weights), sum(buffer.grad_data.nbytes for buffer in buffers),
        _distinct_bytes(held, [*weights, *(buffer.grad_data for buffer in buffers)]), len(weights),
    )  # fmt: skip
    student.close()
    return found


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [False, True], ids=["whole", "distributed"])
@pytest.mark.parametrize(
    ("model", "sizes"), [(TINY, {"dp": 2}), (TINY, {"tp": 2}), (SPARSE, {"dp": 2, "ep": 2})], ids=["DP2", "TP2", "EP2"]
)
def test_training_state_is_that_of_megatrons_optimizer(ranks, model, sizes, bf16, distributed):
    layout = ParallelLayout(**sizes)
    counted = training_state(rank_parameters(model, layout, 0), layout, bf16=bf16, distributed_optimizer=distributed)
    real = ranks(2).run(_real_state, model, layout, bf16, distributed)
    number = real[0][3]
    padding = (64 * number + 4 * 128) if distributed else 0  # of parameters and buckets, in elements
    for weights, gradients, _, _ in real:
        assert weights == counted.weights
        assert counted.gradients <= gradients <= counted.gradients + 4 * padding
    # The shards of a bucket are cut anywhere, so only the ranks together have as much as was counted.
    mean = sum(optimizer for _, _, optimizer, _ in real) / len(real)
    assert mean == pytest.approx(counted.optimizer, abs=0 if not distributed else 12 * 128, rel=1e-9)


def _pass(model, layout, tokens, sequence_parallel=False, train=True, **overrides):
    """(bytes alive after a forward pass, most bytes alive in forward and backward) of this rank."""
    from megatron_tropd.data.packing import pack
    from megatron_tropd.models.build import build_gpt_model, forward_hidden
    from megatron_tropd.parallel.groups import student_groups
    from tools.head_benchmark.memory import LiveBytes

    values = {"sequence_parallel": sequence_parallel, **overrides}
    built = build_gpt_model(model, student_groups(layout), config_overrides=values).train(train)
    ids = [tuple((7 * row + 3 * at) % model.vocab_size for at in range(tokens // 2)) for row in range(2)]
    rollouts = [
        Rollout(
            prompt_uid=row, sample_index=0, token_ids=ids[row], prompt_len=2, guidance_len=0,
            logprobs=(0.0,) * (tokens // 2 - 2), weight_version=(0, 0), finish="length",
        )
        for row in range(2)
    ]  # fmt: skip
    batch = pack(rollouts, None, num_tokens=tokens)
    for _ in range(2):
        gc.collect()
        with torch.set_grad_enabled(train), LiveBytes() as counter:
            out = forward_hidden(built, batch)
            kept, peak = counter.live, counter.peak
            if train:
                out.sum().backward()
                peak = counter.peak
        del out
        for parameter in built.parameters():
            parameter.grad = None
    return kept, peak


def _layers_kept(model, layout, tokens, sequence_parallel=False, **overrides):
    """Bytes that two more layers keep."""
    more = replace(model, num_layers=model.num_layers + 2)
    few, many = (_pass(m, layout, tokens, sequence_parallel, **overrides)[0] for m in (model, more))
    return many - few


KEPT = {
    "qwen3": (TINY, {}),
    "qwen2": (replace(TINY, family="qwen2"), {}),
    "wide feed-forward": (replace(TINY, ffn_hidden_size=256), {}),
    "more heads": (replace(TINY, num_attention_heads=8), {}),
    "TP2": (TINY, {"tp": 2}),
    "TP2, sequence parallel": (TINY, {"tp": 2}),
    "experts": (SPARSE, {}),
    "experts, 4 a token": (replace(SPARSE, num_experts_per_tok=4), {}),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_layer_keeps_what_is_counted(ranks, case):
    model, sizes = KEPT[case]
    layout, tokens, split = ParallelLayout(**sizes), 256, "sequence" in case
    shape = PassShape(tokens=tokens, itemsize=4, sequence_parallel=split, fused=False)
    counted = layer_bytes(model, layout, shape)
    # Not counted: sines and cosines of the angles of queries and keys, and the positions in the padded table.
    left_out = tokens * (4 * 4 * model.head_dim + 32)
    for kept in ranks(layout.world_size).run(_layers_kept, model, layout, tokens, split):
        assert 0.99 * counted <= kept / 2 <= 1.01 * counted + left_out, (kept / 2, counted)
    assert left_out < 0.2 * counted


def test_full_recomputation_keeps_the_input_of_a_layer_and_one_layer(ranks):
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    layout, tokens = ParallelLayout(), 256
    (kept,) = ranks(1).run(_layers_kept, TINY, layout, tokens, **full)
    assert kept / 2 == tokens * 4 * TINY.hidden_size
    shape = PassShape(tokens=tokens, itemsize=4, fused=False)
    deep = replace(TINY, num_layers=8)
    counted = training_bytes(deep, layout, 0, shape, "full", 1)
    ((_, peak),) = ranks(1).run(_pass, deep, layout, tokens, **full)
    # Backward has the gradients of what it goes through, too.
    assert counted < peak < 1.6 * counted, (peak, counted)
    assert training_bytes(deep, layout, 0, shape, "none", 1) > 3 * counted


@pytest.mark.parametrize("model", [TINY, replace(TINY, ffn_hidden_size=512), SPARSE], ids=["narrow", "wide", "experts"])
def test_a_forward_pass_alone_needs_what_is_counted(ranks, model):
    tokens = 512
    ((_, peak),) = ranks(1).run(_pass, model, ParallelLayout(), tokens, train=False)
    counted = forward_bytes(model, ParallelLayout(), PassShape(tokens=tokens, itemsize=4, fused=False))
    assert 0.7 < peak / counted < 1.3, (peak, counted)


def _head_peak(mode, sizes):
    from tools.head_benchmark.contenders import Contender, ours
    from tools.head_benchmark.measure import memory

    return memory(Contender(name=mode, loss="TrOPD", run=ours(mode)), sizes, torch.device("cpu"))


@pytest.mark.parametrize("mode", ["one-pass", "single-chunk"])
def test_the_head_has_the_bytes_that_are_counted(ranks, mode):
    """``memory`` leaves the returned gradients out, which are hidden's and the weight's."""
    from tools.head_benchmark.inputs import Sizes

    sizes = Sizes(tokens=1024, hidden=32, vocab=20_011, chunk=512, top_k=8, dtype=torch.float32)
    (peak,) = ranks(1).run(_head_peak, mode, sizes)
    counted = head_bytes(
        tokens=sizes.tokens,
        chunk=sizes.chunk,
        columns=sizes.vocab,
        hidden=sizes.hidden,
        itemsize=4,
        logits=4,
        mode=mode,
    )
    returned = 4 * sizes.hidden * (sizes.vocab + sizes.tokens)
    assert 0.95 < (peak + returned) / counted < 1.2, (peak, counted)


def test_the_head_of_docs_performance():
    """Its table leaves out the hidden gradient."""
    sizes = {"tokens": 32_768, "chunk": 4096, "hidden": 2048, "itemsize": 2, "logits": 2}
    counted = [head_bytes(**sizes, columns=151_936 // tp, mode="one-pass") - 32_768 * 2048 * 2 for tp in (1, 2, 4, 8)]
    assert [f"{value / 1e9:.1f}" for value in counted] == ["2.5", "1.2", "0.6", "0.3"]


def _hf_model(model, directory):
    from transformers import AutoConfig, AutoModelForCausalLM

    from tools.acceptance.shapes import hf_config

    values = hf_config(model)
    if model.num_experts:
        values |= {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": model.num_experts,
            "num_experts_per_tok": model.num_experts_per_tok, "moe_intermediate_size": model.moe_intermediate_size,
            "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(values))
    config = AutoConfig.from_pretrained(directory)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize(
    "model", [TINY, replace(TINY, tie_word_embeddings=False), SPARSE], ids=["tied", "untied", "experts"]
)
def test_flops_are_those_that_torch_counts(tmp_path, model):
    """Transformers' plain attention multiplies the whole square of a sequence, not its triangle."""
    from torch.utils.flop_counter import FlopCounterMode

    from tools.acceptance.flops import head_flops, layers_flops

    built, length = _hf_model(model, tmp_path), 24
    if model.num_experts:
        built.set_experts_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        built(torch.arange(length)[None], use_cache=False)
    counted = layers_flops(model, length, length * length) + head_flops(model, length)
    assert counter.get_total_flops() == counted
    assert model_parameters(model) == sum(parameter.numel() for parameter in built.parameters())


def _flops_of_rank(model, layout, tokens, sequence_parallel):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        _pass(model, layout, tokens, sequence_parallel, train=False)
    return counter.get_total_flops() / 2  # it runs twice


@pytest.mark.parametrize("split", [False, True], ids=["TP2", "TP2, sequence parallel"])
@pytest.mark.parametrize("sizes", [{"tp": 2}, {"tp": 2, "ep": 2, "etp": 1}], ids=["in parts", "spread"])
def test_tensor_parallel_ranks_repeat_the_work_of_experts(ranks, sizes, split):
    """Without sequence parallelism they send the same tokens to the experts."""
    layout, tokens = ParallelLayout(**sizes), 64
    few, many = SPARSE, replace(SPARSE, num_experts_per_tok=4)
    more = sum(
        b - a
        for a, b in zip(*(ranks(2).run(_flops_of_rank, m, layout, tokens, split) for m in (few, many)), strict=True)
    )
    one = 2 * SPARSE.num_layers * 3 * SPARSE.hidden_size * SPARSE.moe_intermediate_size * tokens
    assert more == one * 2 * (1 if split else layout.tp)
    dense = replace(SPARSE, num_experts_per_tok=0)
    if not split:
        from tools.acceptance.flops import layers_flops

        ideal, without = layers_flops(few, tokens, 0), layers_flops(dense, tokens, 0)
        assert repeated(few, layout) * ideal == pytest.approx(without + (ideal - without) * layout.tp)


def test_kv_bytes_are_those_of_a_cache(tmp_path):
    built = _hf_model(TINY, tmp_path)
    with torch.no_grad():
        cache = built(torch.arange(10)[None], use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 10 * kv_bytes(TINY, built.dtype.itemsize)


def _real_scores(want):
    import torch.distributed as dist

    from megatron_tropd.ops.teacher_head import teacher_scores
    from megatron_tropd.ops.vocab_parallel import VocabShard

    shard = VocabShard(vocab_size=100, rows_per_rank=100, group=dist.group.WORLD, chunk_tokens=4)
    scores = teacher_scores(
        torch.randn(10, 8), torch.randn(100, 8), torch.arange(10), shard, top_k=want.top_k, entropy=want.entropy
    )
    return sum(
        t.nbytes for t in (scores.logprob, scores.topk_ids, scores.topk_logprobs, scores.entropy) if t is not None
    )


@pytest.mark.parametrize("want", [ScoreRequest(), ScoreRequest(top_k=8), ScoreRequest(top_k=5, entropy=True)])
def test_score_bytes_are_those_of_scores(ranks, want):
    (held,) = ranks(1).run(_real_scores, want)
    assert held == 10 * score_bytes(want, hidden=8, itemsize=4)
    assert score_bytes(replace(want, hidden=True), hidden=8, itemsize=2) == held // 10 + 16


def test_scores_as_text():
    chance = random.Random(0)
    logprobs = torch.tensor([-chance.expovariate(0.2) for _ in range(640)]).tolist()
    words = json.dumps([[value, chance.randrange(152_000), None] for value in logprobs])
    assert score_text_bytes(ScoreRequest(top_k=639)) == pytest.approx(len(words), rel=0.3)
