"""Boxes of an SGLang engine's ranks, against splits of whole tensors that share no code with them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tropd.weights.coordinates.engine_boxes import EngineLayout, engine_boxes, parameter_names
from megatron_tropd.weights.coordinates.hf_shapes import hf_shapes
from tests.test_weights_boxes import DENSE, _numbered, make_arch


def _fill(arch, engine, rank):
    shapes = hf_shapes(arch)
    params = {}
    for param in engine_boxes(arch, engine, rank):
        local = np.full(param.shape, -1)
        for box in param.boxes:
            assert local[box.local_slices].shape == box.size
            assert (local[box.local_slices] == -1).all(), "a local element is in two boxes"
            local[box.local_slices] = _numbered(shapes[box.hf_name], box.hf_name)[box.hf_slices]
        (name,) = param.names
        params[name] = local
    return params


def _whole(arch, layer, name):
    full = f"model.layers.{layer}.{name}"
    return _numbered(hf_shapes(arch)[full], full)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_attention_and_mlp_are_in_sglangs_order(tp):
    """4 key/value heads of 16 heads: at TP 8 each is held twice."""
    arch = make_arch("qwen2", repeat=4, hidden=16, head_dim=4)
    for rank in range(tp):
        params = _fill(arch, EngineLayout(tp=tp), rank)
        for kind in ("weight", "bias"):
            q = np.split(_whole(arch, 1, f"self_attn.q_proj.{kind}"), tp)[rank]
            heads = [_whole(arch, 1, f"self_attn.{x}_proj.{kind}").reshape(4, 4, *q.shape[1:]) for x in "kv"]
            mine = [head[rank * 4 // tp : max((rank + 1) * 4 // tp, rank * 4 // tp + 1)] for head in heads]
            expected = np.concatenate([q, *(m.reshape(-1, *q.shape[1:]) for m in mine)])
            assert (params[f"model.layers.1.self_attn.qkv_proj.{kind}"] == expected).all()
        gate_up = [np.split(_whole(arch, 1, f"mlp.{x}_proj.weight"), tp)[rank] for x in ("gate", "up")]
        assert (params["model.layers.1.mlp.gate_up_proj.weight"] == np.concatenate(gate_up)).all()
        for mine, whole in (("self_attn.o_proj", "self_attn.o_proj"), ("mlp.down_proj", "mlp.down_proj")):
            expected = np.split(_whole(arch, 1, f"{whole}.weight"), tp, axis=1)[rank]
            assert (params[f"model.layers.1.{mine}.weight"] == expected).all()
        assert ("lm_head.weight" in params) == (not arch.tie_word_embeddings)


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (4, 4), (4, 2)])
def test_experts_are_stacked(tp, ep):
    arch = make_arch("qwen3_moe")
    per_rank, expert_tp = 8 // ep, tp // ep
    for rank in range(tp):
        params = _fill(arch, EngineLayout(tp=tp, ep=ep), rank)
        w13, w2 = (params[f"model.layers.3.mlp.experts.{name}_weight"] for name in ("w13", "w2"))
        assert len(w13) == len(w2) == per_rank
        for local in range(per_rank):
            expert = f"mlp.experts.{rank // expert_tp * per_rank + local}"
            gate, up, down = (_whole(arch, 3, f"{expert}.{n}_proj.weight") for n in ("gate", "up", "down"))
            parts = [np.split(matrix, expert_tp)[rank % expert_tp] for matrix in (gate, up)]
            assert (w13[local] == np.concatenate(parts)).all()
            assert (w2[local] == np.split(down, expert_tp, axis=1)[rank % expert_tp]).all()
        assert (params["model.layers.3.mlp.gate.weight"] == _whole(arch, 3, "mlp.gate.weight")).all()


@pytest.mark.parametrize(("vocab", "tp", "rows"), [(131, 1, 192), (131, 2, 96), (131, 8, 24), (64, 2, 32), (65, 4, 32)])
def test_vocabulary_is_padded_as_sglang_pads_it(vocab, tp, rows):
    arch = make_arch("qwen3", vocab=vocab, groups=8)
    seen = []
    for rank in range(tp):
        table = _fill(arch, EngineLayout(tp=tp), rank)["lm_head.weight"]
        assert table.shape == (rows, arch.hidden_size)
        real = np.clip(vocab - rank * rows, 0, rows)
        assert (table[real:] == -1).all() and (table[:real] != -1).all()
        seen.append(table[:real])
    assert (np.concatenate(seen) == _numbered((vocab, arch.hidden_size), "lm_head.weight")).all()
    assert EngineLayout(tp=3).padded_vocab_size(100) == 192  # 128 does not split in three
    assert EngineLayout(tp=6).padded_vocab_size(385) == 768


def test_a_tied_head_is_the_embedding():
    assert "lm_head.weight" not in _fill(make_arch(tied=True), EngineLayout(tp=2), 0)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([*DENSE, "qwen3_moe"]), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.booleans())
def test_an_engine_holds_the_whole_model(family, tp, ep, tied):
    """Every element is on some rank, and only key/value heads and replicated tensors are on several."""
    arch = make_arch(family, repeat=2, head_dim=4, hidden=16, tied=tied and family != "qwen3_moe")
    engine = EngineLayout(tp=tp, ep=ep if family == "qwen3_moe" and tp % ep == 0 and tp // ep <= 4 else 1)
    if engine.cut_errors(arch):
        assert family == "qwen3_moe" and tp == 8  # twelve expert columns do not split in eight
        return
    canvas = {name: np.zeros(shape, int) for name, shape in hf_shapes(arch).items()}
    for rank in range(tp):
        for param in engine_boxes(arch, engine, rank):
            for box in param.boxes:
                canvas[box.hf_name][box.hf_slices] += 1
    for name, painted in canvas.items():
        module = name.split(".")[-2]
        copies = (
            tp if "norm" in module or module == "gate" else max(1, tp // 4) if module in ("k_proj", "v_proj") else 1
        )
        assert (painted == copies).all(), name


@pytest.mark.parametrize(
    ("arch", "engine", "message"),
    [
        (make_arch(), EngineLayout(tp=3), "--sglang-tp-size 3 does not divide the model's 8 attention heads"),
        (make_arch(), EngineLayout(tp=2, ep=2), "--sglang-ep-size 2: qwen3 has no experts"),
        (make_arch("qwen3_moe"), EngineLayout(tp=2, ep=4), "--sglang-ep-size 4 does not divide --sglang-tp-size 2"),
        (make_arch("qwen3_moe", tied=True), EngineLayout(), "does not tie"),
    ],
)
def test_what_sglang_cannot_cut_is_refused_by_flag(arch, engine, message):
    with pytest.raises(ValueError, match=message):
        engine_boxes(arch, engine, 0)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "qwen3_moe"])
def test_the_parameters_that_hf_tensors_fill(family):
    """Their names do not depend on the cut; one is expected only when all its parts were sent."""
    arch = make_arch(family)
    names = list(hf_shapes(arch))
    held = parameter_names(arch, names)
    for tp in (1, 2, 4):
        assert held == {param.names[0] for param in engine_boxes(arch, EngineLayout(tp=tp), tp - 1)}
    lost = "model.layers.0.mlp.experts.1.up_proj.weight" if arch.num_experts else "model.layers.0.mlp.up_proj.weight"
    merged = "model.layers.0.mlp.experts.w13_weight" if arch.num_experts else "model.layers.0.mlp.gate_up_proj.weight"
    assert held - parameter_names(arch, [name for name in names if name != lost]) == {merged}
