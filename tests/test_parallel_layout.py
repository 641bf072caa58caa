"""The grid of ranks, against Megatron's own generator of rank groups."""

from __future__ import annotations

import pytest
import torch

from megatron_tropd.models.architecture import UnsupportedArchitecture
from megatron_tropd.models.hf_config import architecture_from_hf_config
from megatron_tropd.parallel.layout import ParallelLayout, stage_sizes

LAYOUTS = [
    ParallelLayout(tp=2, pp=2, dp=2),
    ParallelLayout(tp=2, cp=2, dp=2, pp=2),
    ParallelLayout(tp=2, dp=4, ep=4, etp=1),
    ParallelLayout(tp=2, dp=4, pp=2, ep=2),
    ParallelLayout(tp=1, cp=2, dp=4, pp=3, ep=2, etp=2),
    ParallelLayout(tp=4, dp=1, ep=2, etp=2, pp=2, vpp=2),
]


def _groups(layout: ParallelLayout, coordinates: dict[int, tuple[int, ...]]) -> list[list[int]]:
    """Ranks that share the coordinates which stay fixed, in rank order."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world_size):
        groups.setdefault(coordinates[rank], []).append(rank)
    return sorted(groups.values())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_coordinates_are_megatrons(layout):
    from megatron.core.parallel_state import RankGenerator

    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order=order)
    replicas = layout.stage_size // (layout.expert_tp * layout.ep)
    expert = RankGenerator(tp=layout.expert_tp, ep=layout.ep, dp=replicas, pp=layout.pp, cp=1, order=order)
    for generator, axes in ((dense, {"tp": "tp", "cp": "cp", "dp": "dp", "pp": "pp"}),
                            (expert, {"tp": "etp", "ep": "ep", "dp": "edp", "pp": "pp"})):  # fmt: skip
        for token, varying in axes.items():
            fixed = {
                rank: tuple(getattr(layout.coords(rank), axis) for axis in axes.values() if axis != varying)
                for rank in range(layout.world_size)
            }
            assert _groups(layout, fixed) == sorted(generator.get_ranks(token)), token
            for ranks in generator.get_ranks(token):  # and in the same order inside the group
                assert [getattr(layout.coords(rank), varying) for rank in ranks] == list(range(len(ranks)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_rank_is_the_inverse_of_coords(layout):
    for rank in range(layout.world_size):
        c = layout.coords(rank)
        assert layout.rank(tp=c.tp, pp=c.pp, dp=c.dp, cp=c.cp) == rank


@pytest.mark.parametrize(
    ("pp", "vpp", "first", "last"),
    [
        (2, 2, None, None), (2, 4, None, None), (4, 2, None, None), (4, None, None, None), (2, None, 1, None),
        (2, None, None, 3), (2, None, 5, 3), (4, None, 1, 3), (4, None, 2, None), (2, 2, 6, None), (3, 2, 2, 2),
    ],
)  # fmt: skip
def test_layers_of_a_chunk_are_megatrons(pp, vpp, first, last):
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    config = TransformerConfig(
        num_layers=8, hidden_size=8, num_attention_heads=2, pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp, pipeline_dtype=torch.float32,
        num_layers_in_first_pipeline_stage=first, num_layers_in_last_pipeline_stage=last,
    )  # fmt: skip
    layout = ParallelLayout(pp=pp, vpp=vpp, first_layers=first, last_layers=last)
    seen: list[int] = []
    for stage in range(pp):
        for chunk in range(layout.chunks):
            layers = layout.stage_layers(8, stage, chunk)
            offset = get_transformer_layer_offset(config, vp_stage=chunk if vpp else None, pp_rank=stage)
            assert layers.start == offset
            assert len(layers) == get_num_layers_to_build(config, vp_stage=chunk if vpp else None, pp_rank=stage)
            seen += layers
    assert sorted(seen) == list(range(8))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"first": 4}, "--teacher-decoder-first-pipeline-num-layers 4: needs --teacher-pipeline-model-parallel-size"),
        ({"pp": 3, "first": 1}, "first-pipeline-num-layers 1: 7 of the model's 8 layers are left, .* over the 2 other"),
        ({"pp": 2, "first": 2, "last": 2}, "first-.* 2 and --teacher-decoder-last-.* 2: 4 of the .* the 0 other"),
        ({"pp": 2, "first": 8}, "0 of the model's 8 layers are left"),
        ({"pp": 2, "first": 3, "vpp": 2}, "--teacher-num-virtual-stages-per-pipeline-rank 2 does not divide the 3 layers"),
        ({"pp": 3}, "--teacher-pipeline-model-parallel-size 3 does not divide the model's 8 layers"),
    ],
)  # fmt: skip
def test_layers_that_do_not_split_name_the_flags(sizes, message):
    with pytest.raises(ValueError, match=message):
        stage_sizes(8, **{"pp": 1, "owner": "teacher-", **sizes})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"tp": 2, "ep": 4},
            "--expert-model-parallel-size 4 x --expert-tensor-parallel-size 2 does not divide the 2 ranks",
        ),
        ({"vpp": 2}, "--num-virtual-stages-per-pipeline-rank 2 needs --pipeline-model-parallel-size above 1"),
        ({"cp": 0}, "at least 1"),
    ],
)
def test_impossible_grids_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        ParallelLayout(**sizes)


def test_a_context_size_that_does_not_divide_names_its_flag():
    with pytest.raises(ValueError, match="--teacher-context-parallel-size 3 does not divide the 4 ranks"):
        ParallelLayout.for_world(8, 2, 1, cp=3, owner="teacher-")


QWEN3_MOE = {
    "model_type": "qwen3_moe", "vocab_size": 131, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "rms_norm_eps": 1e-6, "num_experts": 8,
    "moe_intermediate_size": 24, "num_experts_per_tok": 2, "norm_topk_prob": True, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "rope_theta": 1e6, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


def test_experts_of_a_sparse_model_are_read_from_either_spelling():
    arch = architecture_from_hf_config(QWEN3_MOE)
    assert (arch.num_experts, arch.moe_intermediate_size, arch.num_experts_per_tok, arch.norm_topk_prob) == (
        8,
        24,
        2,
        True,
    )
    saved = {**QWEN3_MOE, "num_local_experts": 8}  # what transformers 5 writes
    del saved["num_experts"]
    assert architecture_from_hf_config(saved) == arch


@pytest.mark.parametrize(("name", "value"), [("decoder_sparse_step", 2), ("mlp_only_layers", [0])])
def test_a_model_with_dense_layers_among_sparse_ones_is_refused_by_name(name, value):
    with pytest.raises(UnsupportedArchitecture, match=name):
        architecture_from_hf_config({**QWEN3_MOE, name: value})


def test_layouts_of_experts_are_checked_by_flag():
    arch = architecture_from_hf_config(QWEN3_MOE)
    assert not arch.check_layout(4, 2, ep=4, etp=2, vpp=2)
    errors = "; ".join(arch.check_layout(2, 2, ep=3, etp=5, vpp=3))
    for part in (
        "--expert-model-parallel-size 3 does not divide the model's 8 experts",
        "--expert-tensor-parallel-size 5 does not divide the model's 24 expert columns",
        "--num-virtual-stages-per-pipeline-rank 3 does not divide the 2 layers",
    ):
        assert part in errors
    dense = architecture_from_hf_config({**QWEN3_MOE, "model_type": "qwen3"})
    assert "has no experts" in dense.check_layout(2, 1, ep=2)[0]
    # The weights of shared key/value heads can be cut; running such a model is refused.
    assert not arch.cut_errors(8, 1) and "8 does not divide the model's 4 key/value heads" in arch.check_layout(8, 1)[0]
