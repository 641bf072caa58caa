"""Virtual pipeline stages and uneven stages: the same run as in one stage, and the same weights in every file."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_tropd.parallel.layout import ParallelLayout
from tests.hf_models import read_tensors, save_hf_checkpoint
from tests.one_rank import OneRank, curve_of, difference
from tests.tiny_run import flags, make_world

STEPS, STOP = 3, 2
VIRTUAL = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
UNEVEN = {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 1}
OVERLAP = {"overlap_grad_reduce": True, "bucket_size": 2000}
GATHER = {**OVERLAP, "overlap_param_gather": True, "use_distributed_optimizer": True}
LAYOUTS = {
    "PP2, two virtual stages": (2, VIRTUAL),
    "PP2, two virtual stages, more micro-batches": (2, {**VIRTUAL, "max_tokens_per_microbatch": 20}),
    "PP2 TP2, two virtual stages, sequence parallel": (
        4, {**VIRTUAL, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "PP2 DP2, two virtual stages, all overlaps": (4, {**VIRTUAL, **GATHER}),
    "PP2 DP2, two virtual stages, all overlaps, gathers aligned": (4, {**VIRTUAL, **GATHER, "align_param_gather": True}),
    "PP2, 1 and 3 layers; teacher 3 and 1": (
        2, {**UNEVEN, "teacher_pipeline_model_parallel_size": 2, "teacher_decoder_last_pipeline_num_layers": 1},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), student="qwen3_tied", student_layers=4)


@pytest.fixture(scope="module")
def reference(ranks, world, tmp_path_factory):
    return OneRank(ranks, world, tmp_path_factory.mktemp("one"), STEPS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_samecurve_of(ranks, world, reference, tmp_path, name, measured):
    size, changes = LAYOUTS[name]
    curve = curve_of(ranks, size, flags(world, tmp_path / "run", train_iters=STEPS, **changes))
    worst = difference(curve, reference())
    measured(f"loss and gradient norm of {STEPS} steps equal those of one rank, {name} (relative)", worst, 1e-4)


@pytest.mark.parametrize("objective", ["entropy_opd", "gopd"], ids=["old policy", "reference"])
def test_passes_without_gradients_go_through_virtual_stages(ranks, world, reference, tmp_path, objective, measured):
    """The old policy is scored in the student's chunks; the reference in the student's layout, without chunks."""
    argv = flags(world, tmp_path / "run", train_iters=STEPS, objective=objective, **VIRTUAL)
    worst = difference(curve_of(ranks, 2, argv), reference(objective=objective))
    measured(f"{objective} in two virtual stages equals one rank (relative)", worst, 1e-4)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [((2, VIRTUAL), (2, VIRTUAL)), ((2, VIRTUAL), (2, UNEVEN)), ((2, UNEVEN), (1, {})), ((1, {}), (2, VIRTUAL)),
     ((4, {**VIRTUAL, **GATHER}), (4, {**UNEVEN, "use_distributed_optimizer": True})),
     ((2, {"use_distributed_optimizer": True}), (4, {**VIRTUAL, **GATHER}))],
    ids=["same", "to uneven", "uneven to one", "one to chunks", "overlaps to uneven", "DP2 to chunks and overlaps"],
)  # fmt: skip
def test_a_checkpoint_goes_on_in_any_layout(ranks, world, reference, tmp_path, saved, loaded, measured):
    common = {"train_iters": STEPS, "save_interval": STOP}
    curve_of(ranks, saved[0], flags(world, tmp_path / "run", **common, **saved[1]), STOP)
    rest = curve_of(ranks, loaded[0], flags(world, tmp_path / "run", **common, **loaded[1]))
    worst = difference(rest, reference()[STOP:])
    measured("resume in another number of chunks or layers per stage (relative)", worst, 1e-4)


def _round_trip(directory, layout):
    """HF files -> chunks -> HF tensors; the greatest difference is 0 bits."""
    from megatron_tropd.models.chunks import build_chunks
    from megatron_tropd.parallel.groups import student_groups
    from megatron_tropd.weights.coordinates.parameters import local_parameters
    from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint
    from megatron_tropd.weights.files.load import load_hf_into
    from megatron_tropd.weights.transport.hf_export import export_hf

    checkpoint = HfCheckpoint.open(directory)
    groups = student_groups(layout)
    model = build_chunks(checkpoint.arch, groups, params_dtype=torch.float32, config_overrides={})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    load_hf_into(model, checkpoint, checkpoint.arch, layout, dist.get_rank())
    exported = dict(export_hf(local_parameters(model), checkpoint.arch, layout, dist.group.WORLD, bucket_bytes=20_000))
    expected = read_tensors(directory)
    assert exported.keys() == expected.keys()
    return all(torch.equal(exported[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("variant", ["qwen3", "llama_tied", "qwen3_moe"])
@pytest.mark.parametrize(
    "layout",
    [ParallelLayout(pp=2, vpp=2), ParallelLayout(pp=2, tp=2, vpp=2), ParallelLayout(pp=2, last_layers=1),
     ParallelLayout(pp=2, vpp=2, first_layers=2, last_layers=2),
     ParallelLayout(pp=2, tp=2, first_layers=3)],
    ids=str,
)  # fmt: skip
def test_hf_files_come_back_bit_for_bit(ranks, tmp_path, variant, layout):
    directory = save_hf_checkpoint(tmp_path / "hf", variant)
    assert all(ranks(layout.world_size).run(_round_trip, directory, layout))
