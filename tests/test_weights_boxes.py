"""Boxes: every element of every HF tensor, exactly once, in the place Megatron computes with it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.weights.boxes import hf_shapes, owners, rank_boxes


def make_arch(
    family: str = "qwen3", *, vocab: int = 131, groups: int = 4, repeat: int = 2, layers: int = 4, ffn: int = 16,
    head_dim: int = 3, hidden: int = 8, tied: bool = False,
) -> Architecture:  # fmt: skip
    return Architecture(
        family=family, vocab_size=vocab, hidden_size=hidden, ffn_hidden_size=ffn, num_layers=layers,
        num_attention_heads=groups * repeat, num_query_groups=groups, head_dim=head_dim, norm_epsilon=1e-6,
        max_position_embeddings=64, tie_word_embeddings=tied, rope_theta=1e4,
    )  # fmt: skip


CASES = st.fixed_dictionaries(
    {
        "arch": st.builds(
            make_arch,
            st.sampled_from(["qwen2", "qwen3", "llama"]),
            vocab=st.integers(1, 300),
            groups=st.sampled_from([4, 8]),
            repeat=st.integers(1, 3),
            layers=st.sampled_from([2, 4]),
            head_dim=st.integers(1, 3),
            tied=st.booleans(),
        ),
        "layout": st.builds(
            ParallelLayout, tp=st.sampled_from([1, 2, 4]), pp=st.sampled_from([1, 2]), dp=st.integers(1, 2)
        ),
        "divisor": st.sampled_from([1, 7, 64, 128]),
    }
)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_every_hf_element_has_exactly_one_owner(case):
    arch, layout = case["arch"], case["layout"]
    canvas = {name: np.zeros(shape, int) for name, shape in hf_shapes(arch).items()}
    for owned in owners(arch, layout, make_vocab_size_divisible_by=case["divisor"]):
        assert layout.coords(owned.rank).dp == 0
        canvas[owned.box.hf_name][owned.box.hf_slices] += 1
    for name, painted in canvas.items():
        assert (painted == 1).all(), name


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_every_local_element_is_filled_once_and_padding_never(case):
    arch, layout = case["arch"], case["layout"]
    padded = layout.padded_vocab_size(arch.vocab_size, case["divisor"])
    for rank in range(layout.world_size):
        tp_rank = layout.coords(rank).tp
        for param in rank_boxes(arch, layout, rank, make_vocab_size_divisible_by=case["divisor"]):
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
@given(CASES)
def test_replicas_hold_the_same_boxes(case):
    """Data-parallel ranks are equal; every rank of a stage holds the stage's norms."""
    arch, layout = case["arch"], case["layout"]
    for rank in range(layout.world_size):
        coords = layout.coords(rank)
        first = layout.rank(tp=coords.tp, pp=coords.pp, dp=0)
        assert rank_boxes(arch, layout, rank) == rank_boxes(arch, layout, first)


def _numbered(shape: tuple[int, ...], hf_name: str) -> np.ndarray:
    """A tensor whose elements tell which they are, and of which tensor."""
    base = {"q": 1, "k": 2, "v": 3, "gate": 4, "up": 5}.get(hf_name.split(".")[-2].removesuffix("_proj"), 0)
    return 100_000 * base + np.arange(np.prod(shape)).reshape(shape)


def _fill(arch: Architecture, layout: ParallelLayout, rank: int) -> dict[str, np.ndarray]:
    params = {}
    for param in rank_boxes(arch, layout, rank):
        local = np.full(param.shape, -1)
        for box in param.boxes:
            local[box.local_slices] = _numbered(hf_shapes(arch)[box.hf_name], box.hf_name)[box.hf_slices]
        params[param.names[0]] = local
    return params


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_qkv_and_gate_up_are_in_megatron_order(tp):
    """Against reshapes of whole tensors, which share no code with the boxes."""
    arch = make_arch("qwen2")
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
