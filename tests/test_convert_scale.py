"""Streamed conversion: Megatron itself reads and writes the same format, memory has a bound, and errors are seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoint_convert import hf_to_megatron, megatron_to_hf, megatron_to_megatron
from megatron_tropd.checkpoints.conversion.reading import open_tensors
from megatron_tropd.checkpoints.directory import find_checkpoint, read_metadata
from megatron_tropd.checkpoints.load import load_checkpoint
from megatron_tropd.checkpoints.save import save_checkpoint
from megatron_tropd.checkpoints.state import load_model_state
from megatron_tropd.parallel.groups import release_groups
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint
from tests.streamed import convert_sources, error_of, run_streamed, save_sources
from tests.test_convert import same_files

DENSE = [ParallelLayout(tp=tp, pp=pp) for tp in (1, 2, 4) for pp in (1, 2)]
SPARSE = [
    ParallelLayout(tp=tp, pp=pp, ep=ep, etp=1, dp=max(1, ep // tp)) for tp in (1, 2, 4) for pp in (1, 2) for ep in (1, 2)
]  # fmt: skip

# Run on every rank -------------------------------------------------------------------------------


def _model(hf, layout):
    from megatron_tropd.models.build import build_gpt_model
    from megatron_tropd.parallel.groups import student_groups

    release_groups()
    checkpoint = HfCheckpoint.open(hf)
    groups = student_groups(layout)
    dtype = checkpoint.widest_dtype
    model = build_gpt_model(checkpoint.arch, groups, params_dtype=dtype)
    return checkpoint, groups, model


def _megatron_reads_and_writes(hf, layout, converted, saved):
    """Load a converted checkpoint by Megatron's own loader, compare with the HF files, save by its own writer."""
    from megatron_tropd.weights.coordinates.parameters import local_parameters
    from megatron_tropd.weights.files.load import load_hf_into

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
    from megatron_tropd.weights.files.load import load_hf_into

    layout = replace(layout, make_vocab_size_divisible_by=divisor)
    checkpoint, groups, model = _model(hf, layout)
    arch = checkpoint.arch
    load_hf_into(model, checkpoint, arch, layout, dist.get_rank())
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
    stored = open_tensors(find_checkpoint(directory))
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
    return save_sources(tmp_path_factory.mktemp("hf"))


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
    two.run(run_streamed, hf_to_megatron.convert, "--hf-checkpoint", hf, "--save", tmp_path / "in", "--verify", *flags)
    ranks(layout.world_size).run(_megatron_reads_and_writes, hf, layout, tmp_path / "in", tmp_path / "saved")
    two.run(
        run_streamed,
        megatron_to_hf.convert,
        "--load",
        tmp_path / "saved",
        "--save",
        tmp_path / "out",
        "--verify",
        *flags,
    )
    assert same_files(hf, tmp_path / "out")


def test_a_checkpoint_cut_anew_with_its_optimizer(ranks, sources, tmp_path):
    """Trained at TP 2, cut for TP 4 with another padding: the same numbers, and Megatron trains on as if nothing
    had happened; cut back, nothing has."""
    hf = sources["qwen3_moe"]
    run, cut, back = tmp_path / "run", tmp_path / "cut", tmp_path / "back"
    two = ranks(2)
    two.run(_step, hf, ParallelLayout(tp=2, ep=2, etp=1), 128, None, run)
    two.run(
        run_streamed, megatron_to_megatron.convert, "--load", run, "--save", cut, "--verify", "--make-vocab-size-divisible-by",
        "1", "--tensor-model-parallel-size", "4", "--expert-tensor-parallel-size", "1",
    )  # fmt: skip
    assert read_metadata(cut).iteration == 1
    stored = open_tensors(cut / "iter_0000001")
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
        run_streamed, megatron_to_megatron.convert, "--load", cut, "--save", back, "--make-vocab-size-divisible-by", "128",
        "--no-load-optim", "--iteration", "1",
    )  # fmt: skip
    weights = {key: tensor for key, tensor in _all_stored(run).items() if not key.startswith("optimizer.")}
    found = _all_stored(back)
    assert found.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in found.items())


@pytest.fixture(scope="module")
def converted(ranks, sources, tmp_path_factory):
    return convert_sources(ranks(2), sources, tmp_path_factory.mktemp("megatron"))


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3_moe"])
def test_logits_are_compared_with_transformers(ranks, sources, converted, tmp_path, name):
    one = ranks(1)
    flags = ("--load", converted / name, "--save", tmp_path / "hf", "--verify-logits")
    one.run(run_streamed, megatron_to_hf.convert, *flags)
    assert "runs in one process" in ranks(2).run(error_of, megatron_to_hf.convert, *flags, "--overwrite")[0]


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
