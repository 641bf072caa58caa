"""Wrong conversions, damaged checkpoints and sources that do not fit: seen, the same in every process, never published."""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from checkpoint_convert import common, hf_to_megatron, megatron_to_hf
from megatron_tropd.checkpoints.conversion import reading
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.weights.coordinates.checkpoint_boxes import stored_params
from tests.hf_models import edit_config, read_tensors, write_tensors
from tests.streamed import convert_sources, error_of, save_sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return save_sources(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def converted(ranks, sources, tmp_path_factory):
    return convert_sources(ranks(2), sources, tmp_path_factory.mktemp("megatron"))


def _swap_keys_and_values(args, arch, divisor):
    """A map that is wrong in a way no shape shows."""
    from dataclasses import replace

    params = []
    for param in stored_params(arch, ParallelLayout(make_vocab_size_divisible_by=divisor)):
        other = {"k_proj": "v_proj", "v_proj": "k_proj"}
        kinds = [box.hf_name.split(".")[-2] for box in param.boxes]
        boxes = [
            replace(box, hf_name=box.hf_name.replace(kind, other.get(kind, kind)))
            for box, kind in zip(param.boxes, kinds, strict=True)
        ]
        params.append(replace(param, boxes=tuple(boxes)))
    return tuple(params)


def _error_with_swapped_keys_and_values(*flags):
    with patch.object(common, "target_params", _swap_keys_and_values):
        return error_of(hf_to_megatron.convert, *flags)


def _error_with_a_flipped_bit(*flags):
    """The disk returns other bits than were written to one chunk."""
    from megatron_tropd.weights.files.torch_dist import ChunkFile

    original = ChunkFile.add

    def add(self, key, start, tensor):
        if key == "decoder.layers.self_attention.linear_proj.weight" and start[:2] == (2, 0):
            tensor = tensor.clone()
            tensor.view(torch.uint8).view(-1)[0] ^= 1
        original(self, key, start, tensor)

    with patch.object(ChunkFile, "add", add):
        return error_of(hf_to_megatron.convert, *flags)


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


def _error_if_only_rank_1_cannot_read(name, *flags):
    command = importlib.import_module(name)
    original = reading.read_dcp_metadata

    def read_dcp_metadata(folder):
        if dist.get_rank() == 1:
            raise OSError("this node cannot read the folder")
        return original(folder)

    with patch.object(reading, "read_dcp_metadata", read_dcp_metadata):
        return error_of(command.convert, *flags)


@pytest.mark.parametrize("command", ["megatron_to_hf", "megatron_to_megatron"])
def test_a_checkpoint_that_one_node_cannot_read_is_an_error_on_every_rank(ranks, converted, command, tmp_path):
    flags = ("--load", converted / "qwen3_moe", "--save", tmp_path / "out")
    errors = ranks(2).run(_error_if_only_rank_1_cannot_read, f"checkpoint_convert.{command}", *flags)
    assert errors == ["this node cannot read the folder"] * 2


def _change_architecture(folder, **sizes):
    path = folder / "checkpoint.json"
    value = json.loads(path.read_text())
    value["architecture"].update(sizes)
    path.write_text(json.dumps(value))


def _drop(folder, key):
    """Take one tensor out of ``.metadata`` (and let checkpoint.json agree, as whoever did this would)."""
    from megatron_tropd.checkpoints.safety import read_dcp_metadata
    from megatron_tropd.weights.files.torch_dist import write_metadata
    from tests.test_convert_checkpoint import _rerecord

    metadata = read_dcp_metadata(folder)
    if key in metadata.state_dict_metadata:
        del metadata.state_dict_metadata[key]
        metadata.storage_data = {span: info for span, info in metadata.storage_data.items() if span.fqn != key}
    else:  # one chunk
        name, index = key
        chunk = metadata.state_dict_metadata[name].chunks.pop(index)
        metadata.storage_data = {
            span: info for span, info in metadata.storage_data.items() if (span.fqn, span.offset) != (name, chunk.offsets)
        }  # fmt: skip
    write_metadata(folder, metadata)
    _rerecord(folder, ".metadata")


def _overwrite(folder, data, *, numbers=False):
    """Damage the first chunk: its header, or the numbers it holds."""
    from megatron_tropd.checkpoints.safety import read_dcp_metadata
    from megatron_tropd.weights.files.byte_ranges import FileRanges
    from megatron_tropd.weights.files.torch_dist_chunk import ByteRange, read_header

    info = next(i for i in read_dcp_metadata(folder).storage_data.values() if not i.offset)
    span = ByteRange(file=info.relative_path, offset=0, length=info.length)
    path, offset = folder / span.file, read_header(FileRanges(folder), span).offset if numbers else 0
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
        r"tensor decoder.layers.mlp.linear_fc2.weight of size .* has \d+ elements in its chunks",
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
    errors = ranks(2).run(error_of, megatron_to_hf.convert, "--load", tmp_path / "in", "--save", tmp_path / "out")
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
    error = one.run(error_of, hf_to_megatron.convert, "--hf-checkpoint", padded, "--save", tmp_path / "out")[0]
    assert "model.embed_tokens.weight has shape [256, 32], expected [131, 32]" in error
    heads = Path(shutil.copytree(sources["qwen3_moe"], tmp_path / "heads"))
    edit_config(heads, head_dim=4)
    error = one.run(error_of, hf_to_megatron.convert, "--hf-checkpoint", heads, "--save", tmp_path / "out")[0]
    assert "k_norm.weight has shape [12], expected [4]" in error or "k_proj.weight has shape" in error


def _error_with_a_bad_disk(*flags):
    """What is written to the first file of HF weights does not arrive."""
    from megatron_tropd.weights.files.hf_writer import HfWriter

    original = HfWriter.write_rows

    def write_rows(self, source, row, rows):
        data = original(self, source, row, rows)
        if source == "model.norm.weight":
            original(self, source, row, rows + 1)
        return data

    with patch.object(HfWriter, "write_rows", write_rows):
        return error_of(megatron_to_hf.convert, *flags)


def test_files_that_did_not_arrive_are_not_published(ranks, converted, tmp_path):
    flags = ("--load", converted / "qwen3_moe", "--save", tmp_path / "out", "--verify")
    errors = ranks(2).run(_error_with_a_bad_disk, *flags)
    assert len(set(errors)) == 1
    assert "was not written right: model.norm.weight came back differently" in errors[0]
    assert not list((tmp_path / "out").glob("*.safetensors*"))
