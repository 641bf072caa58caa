"""Checkpoints with more than the weights of a decoder: old RoPE buffers, other parts, quantized weights, windows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from checkpoint_convert import hf_to_megatron, inspect, megatron_to_hf
from megatron_tropd.cli import ConfigError, parse
from megatron_tropd.parallel.groups import release_groups
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.setup.run_spec import make_run_spec
from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint
from megatron_tropd.weights.files.safetensors_header import HfCheckpointError
from tests.hf_models import edit_config, make_hf_model, read_tensors, save_hf_checkpoint, write_tensors
from tests.test_convert import same_files
from tests.test_model_parity import LENGTHS, _logits, _sequences
from tests.tiny_run import flags, make_world

INV_FREQ = "model.layers.{}.self_attn.rotary_emb.inv_freq"


def _run(command, *flags):
    release_groups()
    command.convert([str(flag) for flag in flags])


def _to_megatron(hf, save, *more):
    _run(hf_to_megatron, "--hf-checkpoint", hf, "--save", save, *more)


def _to_hf(load, save, *more):
    _run(megatron_to_hf, "--load", load, "--save", save, *more)


def _error(hf, save):
    with pytest.raises(ValueError) as caught:
        _to_megatron(hf, save)
    return str(caught.value)


def _add_tensors(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Add tensors to a checkpoint: to its last file and its index, if it has several."""
    from safetensors.torch import load_file

    path = sorted(directory.glob("*.safetensors"))[-1]
    write_tensors(directory, load_file(path) | tensors, path.name)
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        content = json.loads(index.read_text())
        content["weight_map"] |= dict.fromkeys(tensors, path.name)
        index.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def old_llama(tmp_path_factory):
    """As transformers before 4.28 wrote it; by file size, since the shards differ in how they are written again."""
    made = {}
    for size in ("5GB", "40KB"):
        directory = save_hf_checkpoint(tmp_path_factory.mktemp("old") / "m", "llama", max_shard_size=size)
        _add_tensors(directory, {INV_FREQ.format(i): torch.arange(1.0, 9.0) for i in range(4)})
        made[size] = directory
    return made


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
def test_old_llama_files_give_the_logits_of_transformers(ranks, old_llama, tp, pp):
    """transformers ignores the buffers; these would give other positions."""
    with torch.no_grad():
        wanted = torch.cat([make_hf_model("llama")(ids[None]).logits[0] for ids in _sequences()])
    for logits in ranks(tp * pp).run(_logits, old_llama["5GB"], ParallelLayout(tp=tp, pp=pp), False)[-tp:]:
        assert (logits[: sum(LENGTHS)] - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("size", ["5GB", "40KB"])
def test_old_llama_files_come_back_without_their_buffers(ranks, old_llama, tmp_path, size):
    """The weights are the same bytes, the files are as if the buffers had never been there, and so they stay."""
    ranks(2).run(_to_megatron, old_llama[size], tmp_path / "megatron", "--verify", "--tensor-model-parallel-size", 2)
    ranks(2).run(_to_hf, tmp_path / "megatron", tmp_path / "hf", "--verify")
    plain = save_hf_checkpoint(tmp_path / "plain", "llama", max_shard_size=size)
    wanted, found = read_tensors(plain), read_tensors(tmp_path / "hf")
    assert wanted.keys() == found.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    if size == "5GB":
        assert same_files(plain, tmp_path / "hf")  # what safetensors writes without the buffers
    ranks(1).run(_to_megatron, tmp_path / "hf", tmp_path / "again")
    ranks(1).run(_to_hf, tmp_path / "again", tmp_path / "hf2")
    assert same_files(tmp_path / "hf", tmp_path / "hf2")


def test_the_user_is_told_what_is_left_aside(old_llama, capsys):
    inspect.inspect([str(old_llama["5GB"])])
    assert (
        "left aside     4 tensors, also when it is converted back: model.layers.0.self_attn" in capsys.readouterr().out
    )


PARTS = {
    "mtp.layers.0.mlp.gate_proj.weight": "multi-token prediction",
    "model.mtp_layers.0.norm.weight": "multi-token prediction",
    "visual.blocks.0.attn.qkv.weight": "vision tower",
    "model.visual.patch_embed.proj.weight": "vision tower",
    "vision_tower.encoder.weight": "vision tower",
}


@pytest.mark.parametrize("size", ["5GB", "40KB"])
def test_parts_beside_the_decoder_are_left_aside_only_when_asked(ranks, tmp_path, size):
    directory = save_hf_checkpoint(tmp_path / "m", "qwen2", max_shard_size=size)
    plain = Path(shutil.copytree(directory, tmp_path / "plain"))
    _add_tensors(directory, {name: torch.ones(3, 5) for name in PARTS})
    (error,) = ranks(1).run(_error, directory, tmp_path / "out")
    assert all(part in error for part in (*PARTS, *PARTS.values(), "--ignore-extra-tensors", "--pretrained-checkpoint"))
    assert not (tmp_path / "out").exists()
    ranks(2).run(_to_megatron, directory, tmp_path / "out", "--ignore-extra-tensors", "--verify")
    ranks(1).run(_to_hf, tmp_path / "out", tmp_path / "hf")
    assert read_tensors(tmp_path / "hf").keys() == read_tensors(plain).keys()
    if size == "5GB":
        assert same_files(plain, tmp_path / "hf")


def test_other_unknown_tensors_are_refused_also_when_parts_are_left_aside(tmp_path):
    directory = save_hf_checkpoint(tmp_path / "m", "qwen2")
    _add_tensors(directory, {"mtp.norm.weight": torch.ones(3), "score.weight": torch.ones(3)})
    with pytest.raises(HfCheckpointError, match=r"unknown tensors: score\.weight"):
        HfCheckpoint.open(directory, ignore_extra=True)


@pytest.mark.parametrize(
    ("tensor", "dtype", "method"),
    [
        ("mlp.up_proj.weight_scale_inv", torch.float32, "FP8"),
        ("mlp.up_proj.weight", torch.float8_e4m3fn, "F8_E4M3"),
        ("mlp.up_proj.qweight", torch.int32, "AWQ or GPTQ"),
        ("mlp.up_proj.g_idx", torch.int32, "GPTQ"),
        ("mlp.up_proj.weight.absmax", torch.float32, "bitsandbytes"),
        ("mlp.up_proj.weight.quant_state.bitsandbytes__nf4", torch.uint8, "bitsandbytes"),
        ("mlp.up_proj.SCB", torch.float32, "bitsandbytes"),
        ("mlp.up_proj.weight_packed", torch.int32, "compressed-tensors"),
    ],
)
def test_quantized_weights_are_refused_by_name_with_the_remedy(tmp_path, tensor, dtype, method):
    directory = save_hf_checkpoint(tmp_path / "m", "llama")
    _add_tensors(directory, {"model.layers.0." + tensor: torch.ones(3, 5).to(dtype)})
    with pytest.raises(HfCheckpointError, match=rf"model\.safetensors: .*{method}.*use the unquantized checkpoint"):
        HfCheckpoint.open(directory)


def test_a_number_of_layers_that_the_files_cannot_hold_is_refused_at_once(tmp_path):
    directory = save_hf_checkpoint(tmp_path / "m", "llama")
    edit_config(directory, num_hidden_layers=10_000)
    with pytest.raises(HfCheckpointError, match=r"10000 layers \(num_hidden_layers\), .* only 39 tensors"):
        HfCheckpoint.open(directory)


def test_a_run_may_be_as_long_as_the_window(tmp_path):
    """The prompts and responses of ``flags`` are 20 tokens together, as is the window of the mistral."""
    world = make_world(tmp_path / "world")
    teacher = save_hf_checkpoint(tmp_path / "m", "mistral")
    argv = flags(world, tmp_path / "run", teacher_hf_checkpoint=teacher)
    assert make_run_spec(parse(argv), 1).models.teachers[0].model.arch.attention_window == 20
    with pytest.raises(
        ConfigError, match=r"= 21 tokens exceed the teacher's sliding_window 20, .* to 20 tokens together"
    ):
        make_run_spec(parse([*argv, "--max-prompt-length", "9"]), 1)
