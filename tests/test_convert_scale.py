"""Streamed conversion: Megatron itself reads and writes the same format, memory has a bound, and errors are seen."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoint_convert import common, hf_to_megatron, megatron_to_hf, megatron_to_megatron, stream
from megatron_tropd.parallel.groups import release_groups
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.training.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    load_model_state,
    read_metadata,
    save_checkpoint,
)
from megatron_tropd.weights.files import HfCheckpoint
from megatron_tropd.weights.stored import stored_params
from tests.hf_models import edit_config, read_tensors, save_hf_checkpoint, write_tensors
from tests.test_convert import same_files

SMALL_BUFFER = 700
"""Bytes: a few rows of the tiny models' tensors, so that every tensor is many bands."""
DENSE = [ParallelLayout(tp=tp, pp=pp) for tp in (1, 2, 4) for pp in (1, 2)]
SPARSE = [
    ParallelLayout(tp=tp, pp=pp, ep=ep, etp=1, dp=max(1, ep // tp)) for tp in (1, 2, 4) for pp in (1, 2) for ep in (1, 2)
]  # fmt: skip

# Run on every rank -------------------------------------------------------------------------------


def _run(command, *flags):
    """A conversion in many small bands."""
    release_groups()
    original, common.buffer_bytes = common.buffer_bytes, lambda args: SMALL_BUFFER
    try:
        command([str(flag) for flag in flags])
    finally:
        common.buffer_bytes = original


def _error(command, *flags):
    with pytest.raises(ValueError) as caught:
        _run(command, *flags)
    return str(caught.value)


def _model(hf, layout, divisor=128):
    from megatron_tropd.models.build import build_gpt_model
    from megatron_tropd.parallel.groups import student_groups

    release_groups()
    checkpoint = HfCheckpoint.open(hf)
    groups = student_groups(layout)
    dtype = checkpoint.widest_dtype
    model = build_gpt_model(checkpoint.arch, groups, params_dtype=dtype, make_vocab_size_divisible_by=divisor)
    return checkpoint, groups, model


def _megatron_reads_and_writes(hf, layout, converted, saved):
    """Load a converted checkpoint by Megatron's own loader, compare with the HF files, save by its own writer."""
    from megatron_tropd.weights.load import load_hf_into, local_parameters

    checkpoint, _, model = _model(hf, layout)
    load_hf_into(model, checkpoint, checkpoint.arch, layout, dist.get_rank())
    wanted = {name: tensor.clone() for name, tensor in local_parameters(model).items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    state, _ = load_checkpoint(converted, None, {"model": model.sharded_state_dict()}, arch=checkpoint.arch)
    load_model_state(model, state["model"])
    for name, tensor in local_parameters(model).items():
        assert torch.equal(tensor.view(torch.uint8), wanted[name].view(torch.uint8)), name
    save_checkpoint(saved, 5, {"model": model.sharded_state_dict()}, {}, arch=checkpoint.arch, hf_sidecar=hf)


def _step(hf, layout, divisor, load, save):
    """Megatron's optimizer: from ``load`` (or the HF weights) one step on made-up gradients, to ``save``."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from megatron_tropd.parallel import platform
    from megatron_tropd.weights.load import load_hf_into

    checkpoint, groups, model = _model(hf, layout, divisor)
    arch = checkpoint.arch
    load_hf_into(model, checkpoint, arch, layout, dist.get_rank(), make_vocab_size_divisible_by=divisor)
    ddp = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True), model
    )
    config = OptimizerConfig(
        optimizer="adam", lr=1e-2, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True, clip_grad=0.0
    )
    optimizer = get_megatron_optimizer(config, [ddp])
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.pg_collection.dp_cp,
    }  # fmt: skip

    def state(is_loading):
        weights = model.sharded_state_dict(metadata=metadata)
        return {
            "model": weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading, metadata=metadata)
        }  # fmt: skip

    count = 0
    if load is not None:
        platform.prime_adam_state(optimizer)
        found, common_values = load_checkpoint(load, None, state(True), arch=arch)
        load_model_state(model, found["model"])
        optimizer.load_state_dict(found["optimizer"])
        platform.separate_adam_steps(optimizer)
        count = common_values["steps"]
    for parameter in ddp.parameters():
        parameter.main_grad.copy_(parameter.detach())  # the same in every layout
    optimizer.step()
    save_checkpoint(
        save, count + 1, state(False), {"steps": count + 1}, arch=arch, hf_sidecar=hf,
        make_vocab_size_divisible_by=divisor,
    )  # fmt: skip


def _all_stored(directory):
    """Every number of a checkpoint, optimizer included, by the package's reader; padding cut off."""
    metadata = read_metadata(directory)
    stored = stream.open_tensors(find_checkpoint(directory))
    tensors = {}
    for key, (shape, dtype) in stored.tensors.items():
        tensors[key] = torch.empty(shape, dtype=dtype)
        stored.read_into(key, (0,) * len(shape), tensors[key])
        if key.endswith(("word_embeddings.weight", "output_layer.weight")):
            tensors[key] = tensors[key][: metadata.architecture.vocab_size]
    return tensors


# Tests -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A dense model with biases and a sparse one, bf16; the sparse one in shards."""
    root = tmp_path_factory.mktemp("hf")
    return {
        name: save_hf_checkpoint(root / name, name, dtype=torch.bfloat16, max_shard_size=size)
        for name, size in (("qwen2_tied", "5GB"), ("qwen3_moe", "40KB"))
    }


def _layout_flags(layout):
    return [
        "--tensor-model-parallel-size", layout.tp, "--pipeline-model-parallel-size", layout.pp,
        "--expert-model-parallel-size", layout.ep, "--expert-tensor-parallel-size", layout.expert_tp,
    ]  # fmt: skip


CASES = [("qwen2_tied", layout) for layout in DENSE] + [("qwen3_moe", layout) for layout in SPARSE]


@pytest.mark.parametrize(
    ("name", "layout"), CASES, ids=[f"{n}-tp{x.tp}-pp{x.pp}-ep{x.ep}" for n, x in CASES]
)  # fmt: skip
def test_megatron_reads_and_writes_what_is_streamed(ranks, sources, tmp_path, name, layout):
    """HF -> stream -> Megatron's GPTModels at TP x PP x EP -> Megatron's writer -> stream -> HF, byte for byte."""
    hf, flags = sources[name], _layout_flags(layout)
    two = ranks(2)
    two.run(_run, hf_to_megatron.convert, "--hf-checkpoint", hf, "--save", tmp_path / "in", "--verify", *flags)
    ranks(layout.world_size).run(_megatron_reads_and_writes, hf, layout, tmp_path / "in", tmp_path / "saved")
    two.run(_run, megatron_to_hf.convert, "--load", tmp_path / "saved", "--save", tmp_path / "out", "--verify", *flags)
    assert same_files(hf, tmp_path / "out")


def test_a_checkpoint_cut_anew_with_its_optimizer(ranks, sources, tmp_path):
    """Trained at TP 2, cut for TP 4 with another padding: the same numbers, and Megatron trains on as if nothing
    had happened; cut back, nothing has."""
    hf = sources["qwen3_moe"]
    run, cut, back = tmp_path / "run", tmp_path / "cut", tmp_path / "back"
    two = ranks(2)
    two.run(_step, hf, ParallelLayout(tp=2, ep=2, etp=1), 128, None, run)
    two.run(
        _run, megatron_to_megatron.convert, "--load", run, "--save", cut, "--verify", "--make-vocab-size-divisible-by",
        "1", "--tensor-model-parallel-size", "4", "--expert-tensor-parallel-size", "1",
    )  # fmt: skip
    assert read_metadata(cut).iteration == 1
    stored = stream.open_tensors(cut / "iter_0000001")
    assert stored.tensors["optimizer.state.exp_avg.output_layer.weight"][0] == (132, 32)  # 131 padded for TP 4
    padding = torch.ones(1, 32)
    stored.read_into("optimizer.state.exp_avg.output_layer.weight", (131, 0), padding)
    assert not padding.any()
    wanted, found = _all_stored(run), _all_stored(cut)
    assert wanted.keys() == found.keys() and any(key.startswith("optimizer.state.exp_avg_sq.") for key in wanted)
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in found.items())

    two.run(_step, hf, ParallelLayout(tp=2, ep=2, etp=1), 128, run, tmp_path / "next")
    two.run(_step, hf, ParallelLayout(dp=2, ep=2), 1, cut, tmp_path / "next_cut")
    wanted, found = _all_stored(tmp_path / "next"), _all_stored(tmp_path / "next_cut")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in found.items())
    assert read_metadata(tmp_path / "next_cut").iteration == 2

    ranks(1).run(
        _run, megatron_to_megatron.convert, "--load", cut, "--save", back, "--make-vocab-size-divisible-by", "128",
        "--no-load-optim", "--iteration", "1",
    )  # fmt: skip
    weights = {key: tensor for key, tensor in _all_stored(run).items() if not key.startswith("optimizer.")}
    found = _all_stored(back)
    assert found.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in found.items())


@pytest.fixture(scope="module")
def converted(ranks, sources, tmp_path_factory):
    """Each source as a Megatron checkpoint."""
    root = tmp_path_factory.mktemp("megatron")
    for name, hf in sources.items():
        ranks(2).run(_run, hf_to_megatron.convert, "--hf-checkpoint", hf, "--save", root / name)
    return root


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3_moe"])
def test_logits_are_compared_with_transformers(ranks, sources, converted, tmp_path, name):
    one = ranks(1)
    flags = ("--load", converted / name, "--save", tmp_path / "hf", "--verify-logits")
    one.run(_run, megatron_to_hf.convert, *flags)
    assert "runs in one process" in ranks(2).run(_error, megatron_to_hf.convert, *flags, "--overwrite")[0]


def _swap_keys_and_values(args, arch, divisor):
    """A map that is wrong in a way no shape shows."""
    from dataclasses import replace

    params = []
    for param in stored_params(arch, make_vocab_size_divisible_by=divisor):
        other = {"k_proj": "v_proj", "v_proj": "k_proj"}
        kinds = [box.hf_name.split(".")[-2] for box in param.boxes]
        boxes = [
            replace(box, hf_name=box.hf_name.replace(kind, other.get(kind, kind)))
            for box, kind in zip(param.boxes, kinds, strict=True)
        ]
        params.append(replace(param, boxes=tuple(boxes)))
    return tuple(params)


def _error_with_swapped_keys_and_values(*flags):
    original, common.target_params = common.target_params, _swap_keys_and_values
    try:
        return _error(hf_to_megatron.convert, *flags)
    finally:
        common.target_params = original


def _error_with_a_flipped_bit(*flags):
    """The disk returns other bits than were written to one chunk."""
    from megatron_tropd.weights.torch_dist import ChunkFile

    original = ChunkFile.add

    def add(self, key, start, tensor):
        if key == "decoder.layers.self_attention.linear_proj.weight" and start[:2] == (2, 0):
            tensor = tensor.clone()
            tensor.view(torch.uint8).view(-1)[0] ^= 1
        original(self, key, start, tensor)

    ChunkFile.add = add
    try:
        return _error(hf_to_megatron.convert, *flags)
    finally:
        ChunkFile.add = original


def test_wrong_conversions_are_not_published(ranks, sources, tmp_path):
    """--verify sees keys and values swapped and a flipped bit; --verify-logits sees what transformers would."""
    flags = ("--hf-checkpoint", sources["qwen3_moe"], "--save", tmp_path / "out")
    errors = ranks(2).run(_error_with_swapped_keys_and_values, *flags, "--verify")
    assert len(set(errors)) == 1 and "model.layers.0.self_attn.k_proj.weight" in errors[0]
    errors = ranks(2).run(_error_with_a_flipped_bit, *flags, "--verify")
    assert len(set(errors)) == 1
    assert "was not written right: model.layers.2.self_attn.o_proj.weight came back differently" in errors[0]
    assert not (tmp_path / "out").exists()
    (error,) = ranks(1).run(_error_with_swapped_keys_and_values, *flags, "--verify-logits")
    assert "logits of" in error and "differ" in error


def _change_architecture(folder, **sizes):
    path = folder / "checkpoint.json"
    value = json.loads(path.read_text())
    value["architecture"].update(sizes)
    path.write_text(json.dumps(value))


def _drop(folder, key):
    """Take one tensor out of ``.metadata`` (and let checkpoint.json agree, as whoever did this would)."""
    from megatron_tropd.training.checkpoint_safety import read_dcp_metadata
    from megatron_tropd.weights.torch_dist import write_metadata
    from tests.test_convert_checkpoint import _rerecord

    metadata = read_dcp_metadata(folder)
    if key in metadata.state_dict_metadata:
        del metadata.state_dict_metadata[key]
    else:  # one chunk
        name, index = key
        chunk = metadata.state_dict_metadata[name].chunks.pop(index)
        metadata.storage_data = {
            place: info for place, info in metadata.storage_data.items() if (place.fqn, place.offset) != (name, chunk.offsets)
        }  # fmt: skip
    write_metadata(folder, metadata)
    _rerecord(folder, ".metadata")


def _overwrite(folder, data, *, numbers=False):
    """Damage the first chunk: its header, or the numbers it holds."""
    from megatron_tropd.training.checkpoint_safety import read_dcp_metadata
    from megatron_tropd.weights.byte_ranges import FileRanges
    from megatron_tropd.weights.chunk_header import Place, read_header

    info = next(i for i in read_dcp_metadata(folder).storage_data.values() if not i.offset)
    place = Place(file=info.relative_path, offset=0, length=info.length)
    path, offset = folder / place.file, read_header(FileRanges(folder), place).offset if numbers else 0
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(data)] = data
    path.write_bytes(raw)


FAULTS = {
    "missing bias": (
        lambda f: _drop(f, "decoder.layers.self_attention.linear_qkv.bias"),
        "missing tensor decoder.layers.self_attention.linear_qkv.bias",
    ),
    "missing chunk": (
        lambda f: _drop(f, ("decoder.layers.mlp.linear_fc2.weight", 3)),
        "decoder.layers.mlp.linear_fc2.weight: the chunks hold",
    ),
    "half as many heads of twice the size": (
        lambda f: _change_architecture(f, num_attention_heads=4, num_query_groups=2, head_dim=8),
        "does not have the bytes it was converted from",
    ),
    "another head size": (
        lambda f: _change_architecture(f, head_dim=8),
        r"linear_qkv.weight has shape \[4, 64, 32\], expected \[4, 128, 32\]",
    ),
    "padding taken for words": (lambda f: _change_architecture(f, vocab_size=256), "of another model"),
    "a damaged chunk": (lambda f: _overwrite(f, b"no zip" * 200), "does not have the bytes|is damaged"),
    "flipped bits of numbers": (lambda f: _overwrite(f, b"\x55\xaa", numbers=True), "does not have the bytes"),
    "a short file": (lambda f: os.truncate(f / "__0_0.distcp", 9000), "bytes, .* were saved; it is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_checkpoints_are_refused(ranks, converted, tmp_path, fault):
    """The same error in every process, and no file with a final name."""
    damage, pattern = FAULTS[fault]
    shutil.copytree(converted / "qwen2_tied", tmp_path / "in")
    damage(tmp_path / "in" / "release")
    errors = ranks(2).run(_error, megatron_to_hf.convert, "--load", tmp_path / "in", "--save", tmp_path / "out")
    assert len(set(errors)) == 1
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(errors[0])
    assert not list((tmp_path / "out").glob("*.safetensors*"))


def test_vocabulary_padding_in_a_source_is_refused(ranks, sources, tmp_path):
    """A table that kept its padded rows, and a head size that is not the weights'."""
    padded = Path(shutil.copytree(sources["qwen2_tied"], tmp_path / "padded"))
    tensors = read_tensors(padded)
    table = tensors["model.embed_tokens.weight"]
    write_tensors(padded, tensors | {"model.embed_tokens.weight": torch.cat([table, torch.zeros(125, 32).to(table)])})
    one = ranks(1)
    error = one.run(_error, hf_to_megatron.convert, "--hf-checkpoint", padded, "--save", tmp_path / "out")[0]
    assert "model.embed_tokens.weight has shape [256, 32], expected [131, 32]" in error
    heads = Path(shutil.copytree(sources["qwen3_moe"], tmp_path / "heads"))
    edit_config(heads, head_dim=4)
    error = one.run(_error, hf_to_megatron.convert, "--hf-checkpoint", heads, "--save", tmp_path / "out")[0]
    assert "k_norm.weight has shape [12], expected [4]" in error or "k_proj.weight has shape" in error


def _peak_of(command, *flags):
    """Bytes by which this process's peak memory exceeds what it held before."""
    from tools.measure_conversion import peak_bytes

    release_groups()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak_bytes()
    command([str(flag) for flag in flags])
    return peak_bytes() - before


def test_memory_does_not_grow_with_the_model(ranks, tmp_path):
    """Four times the layers, the same peak: at most two of the largest tensor and a buffer, in fact some buffers."""
    from tools.measure_conversion import COMMON, write_checkpoint

    buffer, largest = 2 << 20, 16384 * 512 * 2
    sizes = {**COMMON, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 16384}
    peaks = {}
    for layers in (4, 16):
        work = tmp_path / str(layers)
        total = write_checkpoint(work / "hf", {**sizes, "num_hidden_layers": layers})
        flags = ("--buffer-mib", "2", "--verify")
        peaks[layers] = (
            ranks(2).run(_peak_of, hf_to_megatron.convert, "--hf-checkpoint", work / "hf", "--save", work / "m", *flags)
            + ranks(2).run(_peak_of, megatron_to_hf.convert, "--load", work / "m", "--save", work / "again", *flags)
            + ranks(2).run(_peak_of, megatron_to_megatron.convert, "--load", work / "m", "--save", work / "n", *flags)
        )
        assert max(peaks[layers]) < 2 * largest + buffer < total / 2, peaks
    assert max(peaks[16]) < max(peaks[4]) + 2 * buffer, peaks


def _error_with_a_bad_disk(*flags):
    """What is written to the first file of HF weights does not arrive."""
    from megatron_tropd.weights.writer import HfWriter

    original = HfWriter.write_rows

    def write_rows(self, source, row, rows):
        data = original(self, source, row, rows)
        if source == "model.norm.weight":
            original(self, source, row, rows + 1)
        return data

    HfWriter.write_rows = write_rows
    try:
        return _error(megatron_to_hf.convert, *flags)
    finally:
        HfWriter.write_rows = original


def test_files_that_did_not_arrive_are_not_published(ranks, converted, tmp_path):
    flags = ("--load", converted / "qwen3_moe", "--save", tmp_path / "out", "--verify")
    errors = ranks(2).run(_error_with_a_bad_disk, *flags)
    assert len(set(errors)) == 1
    assert "was not written right: model.norm.weight came back differently" in errors[0]
    assert not list((tmp_path / "out").glob("*.safetensors*"))
