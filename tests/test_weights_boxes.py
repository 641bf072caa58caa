"""Boxes: every element of every HF tensor, exactly once, in the place Megatron computes with it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.weights.coordinates.hf_shapes import hf_shapes
from megatron_tropd.weights.coordinates.megatron_boxes import owners, rank_boxes


def make_arch(
    family: str = "qwen3", *, vocab: int = 131, groups: int = 4, repeat: int = 2, layers: int = 4, ffn: int = 16,
    head_dim: int = 3, hidden: int = 8, tied: bool = False,
) -> Architecture:  # fmt: skip
    experts = {"num_experts": 8, "moe_intermediate_size": 12, "num_experts_per_tok": 2} if family == "qwen3_moe" else {}
    return Architecture(
        family=family, vocab_size=vocab, hidden_size=hidden, ffn_hidden_size=ffn, num_layers=layers,
        num_attention_heads=groups * repeat, num_query_groups=groups, head_dim=head_dim, norm_epsilon=1e-6,
        max_position_embeddings=64, tie_word_embeddings=tied, rope_theta=1e4, **experts,
    )  # fmt: skip


DENSE = ["qwen2", "qwen3", "llama"]


@st.composite
def cases(draw, families=(*DENSE, "qwen3_moe")):
    """An architecture and a layout that fits it, with any padding of the vocabulary."""
    arch = draw(
        st.builds(
            make_arch, st.sampled_from(families), vocab=st.integers(1, 300), groups=st.sampled_from([1, 2, 4, 8]),
            repeat=st.sampled_from([4, 8]), layers=st.sampled_from([4, 8]), head_dim=st.sampled_from([2, 4, 6]),
            tied=st.booleans(),
        )
    )  # fmt: skip
    tp, cp, dp = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    pp = draw(st.sampled_from([1, 2]))
    vpp = draw(st.sampled_from([None, 2])) if pp > 1 else None
    ep, etp = 1, None
    if arch.num_experts:
        etp = draw(st.sampled_from([None, 1, 2]))
        shared = tp * cp * dp // (tp if etp is None else etp)
        etp, shared = (etp, shared) if shared else (None, cp * dp)
        ep = draw(st.sampled_from([n for n in (1, 2, 4, 8) if shared % n == 0]))
    divisor = draw(st.sampled_from([1, 7, 64, 128]))
    layout = ParallelLayout(tp=tp, cp=cp, dp=dp, pp=pp, vpp=vpp, ep=ep, etp=etp, make_vocab_size_divisible_by=divisor)
    return {"arch": arch, "layout": layout}


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_hf_element_has_exactly_one_owner(case):
    arch, layout = case["arch"], case["layout"]
    canvas = {name: np.zeros(shape, int) for name, shape in hf_shapes(arch).items()}
    for owned in owners(arch, layout):
        assert arch.num_experts or (layout.coords(owned.rank).dp, layout.coords(owned.rank).cp) == (0, 0)
        canvas[owned.box.hf_name][owned.box.hf_slices] += 1
    for name, painted in canvas.items():
        assert (painted == 1).all(), name


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_local_element_is_filled_once_and_padding_never(case):
    arch, layout = case["arch"], case["layout"]
    padded = layout.padded_vocab_size(arch.vocab_size)
    for rank in range(layout.world_size):
        tp_rank = layout.coords(rank).tp
        for param in rank_boxes(arch, layout, rank):
            painted = np.zeros(param.shape, int)
            for box in param.boxes:
                painted[box.local_slices] += 1
                assert painted[box.local_slices].shape == box.size
            expected = np.ones(param.shape, int)
            if "embedding" in param.names[0] or "output_layer" in param.names[0]:
                assert param.shape[0] == padded // layout.tp
                expected[max(0, arch.vocab_size - tp_rank * param.shape[0]) :] = 0
            assert (painted == expected).all(), param.names


@settings(max_examples=40, deadline=None)
@given(cases())
def test_replicas_hold_the_same_boxes(case):
    """Ranks that differ only in data, context and expert-data coordinates are equal; an expert is where its
    expert coordinates say."""
    arch, layout = case["arch"], case["layout"]
    first: dict[tuple[int, ...], tuple] = {}
    for rank in range(layout.world_size):
        c = layout.coords(rank)
        boxes = rank_boxes(arch, layout, rank)
        assert first.setdefault((c.tp, c.pp, c.ep, c.etp), boxes) == boxes
        held = {
            int(box.hf_name.split(".experts.")[1].split(".")[0])
            for param in boxes for box in param.boxes if ".experts." in box.hf_name
        }  # fmt: skip
        per_rank = arch.num_experts // layout.ep
        assert held == set(range(c.ep * per_rank, (c.ep + 1) * per_rank))


def _numbered(shape: tuple[int, ...], hf_name: str) -> np.ndarray:
    """A tensor whose elements tell which they are, and of which tensor."""
    base = {"q": 1, "k": 2, "v": 3, "gate": 4, "up": 5}.get(hf_name.split(".")[-2].removesuffix("_proj"), 0)
    expert = int(hf_name.split(".experts.")[1].split(".")[0]) if ".experts." in hf_name else 0
    return 1_000_000 * expert + 100_000 * base + np.arange(np.prod(shape)).reshape(shape)


def _fill(arch: Architecture, layout: ParallelLayout, rank: int) -> dict[str, np.ndarray]:
    params = {}
    for param in rank_boxes(arch, layout, rank):
        local = np.full(param.shape, -1)
        for box in param.boxes:
            local[box.local_slices] = _numbered(hf_shapes(arch)[box.hf_name], box.hf_name)[box.hf_slices]
        params[param.names[0]] = local
    return params


@pytest.mark.parametrize("tp", [1, 2, 4, 8])  # 8: twice as many ranks as key/value heads
def test_qkv_and_gate_up_are_in_megatron_order(tp):
    """Against reshapes of whole tensors, which share no code with the boxes."""
    arch = make_arch("qwen2", head_dim=4)
    groups, hidden = arch.num_query_groups, arch.hidden_size
    shapes = hf_shapes(arch)

    def whole(name):
        return _numbered(shapes["model.layers.1." + name], name)

    for kind, rest in (("weight", (hidden,)), ("bias", ())):
        parts = [whole(f"self_attn.{x}_proj.{kind}").reshape(groups, -1, *rest) for x in "qkv"]
        qkv = np.split(np.concatenate(parts, axis=1).reshape(-1, *rest), tp)
        for rank in range(tp):
            params = _fill(arch, ParallelLayout(tp=tp), rank)
            assert (params[f"decoder.layers.1.self_attention.linear_qkv.{kind}"] == qkv[rank]).all()
    for rank in range(tp):
        shards = [np.split(whole(f"mlp.{x}_proj.weight"), tp)[rank] for x in ("gate", "up")]
        params = _fill(arch, ParallelLayout(tp=tp), rank)
        assert (params["decoder.layers.1.mlp.linear_fc1.weight"] == np.concatenate(shards)).all()
        down = np.split(whole("mlp.down_proj.weight"), tp, axis=1)[rank]
        assert (params["decoder.layers.1.mlp.linear_fc2.weight"] == down).all()


def test_tied_output_is_a_replica_of_the_embedding_on_the_last_stage_only():
    arch = make_arch(tied=True)
    assert "lm_head.weight" not in hf_shapes(arch)
    names = {name for param in rank_boxes(arch, ParallelLayout(), 0) for name in param.names}
    assert "output_layer.weight" not in names
    layout = ParallelLayout(tp=2, pp=2)
    for rank in (2, 3):
        output = next(p for p in rank_boxes(arch, layout, rank) if p.names == ("output_layer.weight",))
        assert output.boxes == next(p for p in rank_boxes(arch, layout, rank - 2) if "embedding" in p.names[0]).boxes
    embedding = [o for o in owners(arch, layout) if o.box.hf_name == "model.embed_tokens.weight"]
    assert {o.rank for o in embedding} == {0, 1}


def test_layer_names_are_local_to_the_stage():
    arch = make_arch(layers=4)
    for rank in (0, 1):
        names = {n for p in rank_boxes(arch, ParallelLayout(pp=2), rank) for n in p.names if "layers" in n}
        assert {name.split(".")[2] for name in names} == {"0", "1"}


def test_a_layout_that_does_not_divide_names_every_flag():
    with pytest.raises(ValueError, match=r"--tensor-model-parallel-size 3 .*--pipeline-model-parallel-size 3"):
        rank_boxes(make_arch(layers=4), ParallelLayout(tp=3, pp=3), 0)


def test_chunks_of_a_virtual_pipeline_have_their_own_names():
    arch, layout = make_arch(layers=4, tied=True), ParallelLayout(pp=2, vpp=2)
    names = [{p.names[0]: p for p in rank_boxes(arch, layout, rank)} for rank in (0, 1)]
    norm = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    held = [names[rank][f"model{chunk}.{norm}"].boxes[0].hf_name for chunk in (0, 1) for rank in (0, 1)]
    assert held == [f"model.layers.{n}.input_layernorm.weight" for n in range(4)]
    assert "model0.embedding.word_embeddings.weight" in names[0] and "model1.output_layer.weight" in names[1]
    assert not any("output_layer" in name for name in names[0])


@pytest.mark.parametrize(("tp", "dp", "ep", "etp"), [(2, 2, 2, None), (2, 2, 4, 1), (4, 1, 2, 2), (1, 4, 2, 2)])
def test_experts_are_cut_by_their_own_grid(tp, dp, ep, etp):
    """Against splits of whole tensors; dense parts of the same ranks stay cut by tensor parallelism."""
    arch, layout = make_arch("qwen3_moe"), ParallelLayout(tp=tp, dp=dp, ep=ep, etp=etp)
    shapes = hf_shapes(arch)
    for rank in range(layout.world_size):
        params = _fill(arch, layout, rank)
        within, per_rank = rank % (layout.expert_tp * ep), arch.num_experts // ep
        for local in range(per_rank):
            expert = within // layout.expert_tp * per_rank + local
            whole = {
                n: _numbered(shapes[name], name)
                for n in ("gate", "up", "down") for name in [f"model.layers.2.mlp.experts.{expert}.{n}_proj.weight"]
            }  # fmt: skip
            part = within % layout.expert_tp
            fc1 = [np.split(whole[n], layout.expert_tp)[part] for n in ("gate", "up")]
            assert (params[f"decoder.layers.2.mlp.experts.linear_fc1.weight{local}"] == np.concatenate(fc1)).all()
            fc2 = np.split(whole["down"], layout.expert_tp, axis=1)[part]
            assert (params[f"decoder.layers.2.mlp.experts.linear_fc2.weight{local}"] == fc2).all()
        proj = "self_attn.o_proj.weight"
        whole_proj = _numbered(shapes[f"model.layers.2.{proj}"], f"model.layers.2.{proj}")
        expected = np.split(whole_proj, tp, axis=1)[rank % tp]
        assert (params["decoder.layers.2.self_attention.linear_proj.weight"] == expected).all()


def test_both_spellings_of_an_expert_are_known():
    names = {n for p in rank_boxes(make_arch("qwen3_moe"), ParallelLayout(dp=2, ep=2), 1) for n in p.names}
    for name in ("experts.linear_fc1.weight3", "experts.local_experts.3.linear_fc2.weight", "router.weight"):
        assert f"decoder.layers.0.mlp.{name}" in names
    assert "decoder.layers.0.mlp.experts.linear_fc1.weight4" not in names
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" not in names
