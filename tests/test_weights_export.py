"""Loading into real GPTModels and exporting them: bit exact for every layout."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_tropd.parallel.groups import release_groups
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.weights.coordinates.hf_shapes import hf_shapes
from megatron_tropd.weights.coordinates.megatron_boxes import rank_boxes
from megatron_tropd.weights.coordinates.parameters import WeightMismatch, local_parameters
from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint
from megatron_tropd.weights.files.load import load_hf_into
from megatron_tropd.weights.transport.hf_export import HfExporter, export_hf
from tests.hf_models import read_tensors, save_hf_checkpoint
from tests.test_weights_boxes import make_arch

# Run on every rank -------------------------------------------------------------------------------


def _random_bits(shape, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bit pattern at all: NaN payloads, infinities, denormals."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _check_export(arch, layout, dtype, bucket_bytes):
    """Cut random HF tensors by the boxes, poison the padding, export, compare bits.  Three versions."""
    rank = dist.get_rank()
    exporter = HfExporter(arch, layout, rank, dtype=dtype, bucket_bytes=bucket_bytes)
    digests: list = [None] * layout.world_size
    dist.all_gather_object(digests, exporter.digest)
    assert len(set(digests)) == 1
    for version in range(3):
        source = {
            name: _random_bits(shape, dtype, 100 * version + number)
            for number, (name, shape) in enumerate(hf_shapes(arch).items())
        }
        params = {}
        for param in rank_boxes(arch, layout, rank):
            local = torch.full(param.shape, torch.nan, dtype=dtype)
            for box in param.boxes:
                local[box.local_slices] = source[box.hf_name][box.hf_slices]
            params[param.names[version % len(param.names)]] = local  # TE names and local-spec names
        exported = dict(exporter.export(params, dist.group.WORLD))
        assert list(exported) == list(source)
        storages = {t.untyped_storage().data_ptr() for t in params.values()}
        for name, tensor in exported.items():
            assert torch.equal(_bits(tensor), _bits(source[name])), (name, version)
            assert tensor.untyped_storage().data_ptr() not in storages
    return len(exporter.buckets)


def _build(arch, layout, dtype):
    from megatron_tropd.models.build import build_gpt_model
    from megatron_tropd.parallel.groups import student_groups

    release_groups()
    return build_gpt_model(arch, student_groups(layout), params_dtype=dtype)


def _check_model_round_trip(directory, layout):
    """HF files -> GPTModel parameters -> HF tensors."""
    from megatron.core.transformer.module import Float16Module

    checkpoint = HfCheckpoint.open(directory)
    model = _build(checkpoint.arch, layout, checkpoint.widest_dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    load_hf_into(model, checkpoint, checkpoint.arch, layout, dist.get_rank())
    half = checkpoint.widest_dtype != torch.float32
    params = local_parameters(Float16Module(model.config, model) if half else model)
    assert not any(parameter.isnan().any() for parameter in params.values())  # padding is zero
    exported = dict(export_hf(params, checkpoint.arch, layout, dist.group.WORLD, bucket_bytes=20_000))
    for name, tensor in read_tensors(directory).items():
        assert torch.equal(_bits(exported.pop(name)), _bits(tensor)), name
    assert not exported


def _check_refusals(directory):
    checkpoint = HfCheckpoint.open(directory)
    layout = ParallelLayout()
    model = _build(checkpoint.arch, layout, torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(WeightMismatch, match=r"embedding.* has local shape \[256, 32\], expected \[132, 32\]"):
        load_hf_into(model, checkpoint, checkpoint.arch, ParallelLayout(make_vocab_size_divisible_by=4), 0)
    model.decoder.layers[1].extra = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(WeightMismatch, match=r"unknown parameter decoder\.layers\.1\.extra"):
        load_hf_into(model, checkpoint, checkpoint.arch, layout, 0)
    del model.decoder.layers[1].extra
    model.decoder.layers[1].mlp.linear_fc2.weight = None
    with pytest.raises(WeightMismatch, match=r"none of decoder\.layers\.1\.mlp\.linear_fc2\.weight"):
        load_hf_into(model, checkpoint, checkpoint.arch, layout, 0)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in after)
    exporter = HfExporter(checkpoint.arch, layout, 0, dtype=torch.bfloat16)
    model = _build(checkpoint.arch, layout, torch.float32)
    with pytest.raises(ValueError, match=r"the exporter was made for torch\.bfloat16"):
        exporter.export(local_parameters(model))
    with pytest.raises(ValueError, match="the layout has 2 ranks, the export group has 1"):
        export_hf(local_parameters(model), checkpoint.arch, ParallelLayout(dp=2), dist.group.WORLD)


# Tests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tp", "pp", "dp"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (4, 1, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2)]
)
@pytest.mark.parametrize("tied", [False, True])
def test_export_is_bit_exact(ranks, tp, pp, dp, tied):
    layout = ParallelLayout(tp=tp, pp=pp, dp=dp)
    arch = make_arch("qwen2" if pp == 1 else "qwen3", tied=tied)
    dtype = torch.bfloat16 if tied else torch.float32
    for bucket_bytes, least, most in ((1, len(hf_shapes(arch)), 999), (4096, 2, 30), (1 << 20, 1, 1)):
        counts = ranks(layout.world_size).run(_check_export, arch, layout, dtype, bucket_bytes)
        assert all(least <= count <= most for count in counts)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return {
        "qwen2": save_hf_checkpoint(root / "qwen2", "qwen2"),
        "qwen3_tied": save_hf_checkpoint(root / "qwen3_tied", "qwen3_tied", dtype=torch.bfloat16),
        "llama": save_hf_checkpoint(root / "llama", "llama", dtype=torch.bfloat16),
        "llama_tied": save_hf_checkpoint(root / "llama_tied", "llama_tied"),
    }


@pytest.mark.parametrize(
    ("variant", "tp", "pp", "dp"),
    [
        ("qwen2", 1, 1, 1), ("qwen2", 2, 1, 1), ("qwen2", 2, 2, 1), ("qwen3_tied", 1, 2, 1), ("qwen3_tied", 2, 2, 1),
        ("llama", 4, 1, 1), ("llama", 1, 2, 2), ("llama_tied", 2, 1, 2), ("llama_tied", 1, 4, 1),
    ],
)  # fmt: skip
def test_load_then_export_of_a_gpt_model(ranks, sources, variant, tp, pp, dp):
    layout = ParallelLayout(tp=tp, pp=pp, dp=dp)
    ranks(layout.world_size).run(_check_model_round_trip, sources[variant], layout)


def test_modules_that_do_not_fit_are_refused_before_a_value_moves(ranks, sources):
    ranks(1).run(_check_refusals, sources["qwen2"])
