"""HF directories: read exactly, refused when damaged, written again byte for byte."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from megatron_tropd.models.hf_config import load_architecture
from megatron_tropd.weights.files.hf_checkpoint import INDEX_FILE, SINGLE_FILE, HfCheckpoint, copy_sidecars
from megatron_tropd.weights.files.hf_manifest import HfManifest
from megatron_tropd.weights.files.hf_writer import write_hf_files
from megatron_tropd.weights.files.safetensors_header import HfCheckpointError
from tests.hf_models import edit_config, read_tensors, save_hf_checkpoint, write_tensors


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return {
        "one": save_hf_checkpoint(root / "one", "qwen2", dtype=torch.bfloat16),
        "shards": save_hf_checkpoint(root / "shards", "qwen3", max_shard_size="40KB"),
        "tied": save_hf_checkpoint(root / "tied", "llama_tied"),
    }


@pytest.fixture
def damaged(sources, tmp_path):
    """A copy to damage: ``damaged("one")``."""
    return lambda name: shutil.copytree(sources[name], tmp_path / name)


@pytest.mark.parametrize("name", ["one", "shards", "tied"])
def test_read_gives_every_range(sources, name):
    checkpoint = HfCheckpoint.open(sources[name])
    expected = read_tensors(sources[name])
    assert checkpoint.tensors.keys() == expected.keys()
    for tensor_name, tensor in expected.items():
        assert torch.equal(checkpoint.read(tensor_name), tensor)
    table = expected["model.embed_tokens.weight"]
    assert torch.equal(checkpoint.read("model.embed_tokens.weight", (7, 3), (100, 11)), table[7:107, 3:14])
    with pytest.raises(IndexError, match="no box"):
        checkpoint.read("model.embed_tokens.weight", (100, 0), (32, 32))


@pytest.mark.parametrize("name", ["one", "shards", "tied"])
def test_written_files_are_byte_identical(sources, tmp_path, name):
    checkpoint = HfCheckpoint.open(sources[name])
    digests = {tensor: checkpoint.sha256(tensor) for tensor in checkpoint.tensors}
    manifest = HfManifest.from_json(HfManifest.of(checkpoint, sha256=digests).to_json())
    backwards = reversed(list(read_tensors(sources[name]).items()))
    write_hf_files(tmp_path, manifest, checkpoint.arch, backwards, verify=True)
    copy_sidecars(sources[name], tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in sources[name].iterdir()}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (sources[name] / path.name).read_bytes(), path.name


def test_a_copy_that_was_ended_early_has_no_config(sources, tmp_path):
    """config.json comes last, so that who finds it finds an export that is whole."""
    names = sorted(path.name for path in sources["one"].iterdir() if path.suffix == ".json")
    blocked = tmp_path / names[-1]
    assert blocked.name > "config.json"
    blocked.mkdir()
    with pytest.raises(IsADirectoryError):
        copy_sidecars(sources["one"], tmp_path)
    assert not (tmp_path / "config.json").exists()
    blocked.rmdir()
    assert sorted(copy_sidecars(sources["one"], tmp_path)) == sorted(path.name for path in tmp_path.iterdir())
    assert (tmp_path / "config.json").read_bytes() == (sources["one"] / "config.json").read_bytes()


def test_metadata_and_order_of_any_writer_survive(damaged, tmp_path):
    """A legal file that the safetensors library would not write: other order, metadata, no padding."""
    directory = damaged("tied")
    tensors = read_tensors(directory)
    header, data = {"__metadata__": {"z": "1", "a": "2"}}, b""
    for name in sorted(tensors, reverse=True):
        raw = tensors[name].view(torch.uint8).numpy().tobytes()
        header[name] = {
            "shape": list(tensors[name].shape), "dtype": "F32", "data_offsets": [len(data), len(data) + len(raw)]
        }  # fmt: skip
        data += raw
    text = json.dumps(header).encode()
    (directory / SINGLE_FILE).write_bytes(len(text).to_bytes(8, "little") + text + data)
    checkpoint = HfCheckpoint.open(directory)
    manifest = HfManifest.from_json(HfManifest.of(checkpoint).to_json())
    write_hf_files(tmp_path / "out", manifest, checkpoint.arch, tensors.items(), verify=True)
    assert (tmp_path / "out" / SINGLE_FILE).read_bytes() == (directory / SINGLE_FILE).read_bytes()


def test_default_manifest_writes_what_safetensors_writes(sources, tmp_path):
    tensors = read_tensors(sources["one"])
    arch = load_architecture(sources["one"])
    write_hf_files(tmp_path, HfManifest.default(arch, torch.bfloat16), arch, tensors.items(), verify=False)
    assert (tmp_path / SINGLE_FILE).read_bytes() == write_tensors(tmp_path, tensors, "again").read_bytes()
    sharded = HfManifest.default(arch, torch.bfloat16, max_shard_bytes=20_000)
    assert len(sharded.headers) > 3
    write_hf_files(tmp_path / "s", sharded, arch, tensors.items(), verify=False)
    shutil.copy(sources["one"] / "config.json", tmp_path / "s")
    assert all(torch.equal(HfCheckpoint.open(tmp_path / "s").read(n), t) for n, t in tensors.items())


def _refused(directory, pattern):
    with pytest.raises(HfCheckpointError, match=pattern):
        HfCheckpoint.open(directory)


def test_truncated_file(damaged):
    directory = damaged("one")
    raw = (directory / SINGLE_FILE).read_bytes()
    for kept in (len(raw) - 1, len(raw) // 2):
        (directory / SINGLE_FILE).write_bytes(raw[:kept])
        _refused(directory, rf"header says {len(raw)} bytes, the file has {kept}")
    for kept in (0, 5, 100):
        (directory / SINGLE_FILE).write_bytes(raw[:kept])
        _refused(directory, "not a complete safetensors file")


def test_damaged_header(damaged):
    directory = damaged("one")
    raw = bytearray((directory / SINGLE_FILE).read_bytes())
    raw[8] = ord("[")
    (directory / SINGLE_FILE).write_bytes(raw)
    _refused(directory, "header is damaged")


def test_pickles_are_not_read(damaged):
    directory = damaged("one")
    (directory / SINGLE_FILE).rename(directory / "pytorch_model.bin")
    _refused(directory, "pytorch_model.bin is a pickle, which is not supported")


def test_missing_config(damaged):
    directory = damaged("one")
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs a config\.json"):
        HfCheckpoint.open(directory)


def test_index_names_a_missing_file(damaged):
    directory = damaged("shards")
    (directory / "model-00002-of-00013.safetensors").unlink()
    _refused(directory, r"places \d+ tensors in model-00002-of-00013.safetensors, which does not exist")


def test_index_may_not_leave_the_directory(damaged):
    directory = damaged("shards")
    index = json.loads((directory / INDEX_FILE).read_text())
    index["weight_map"]["lm_head.weight"] = "../one/model.safetensors"
    (directory / INDEX_FILE).write_text(json.dumps(index))
    _refused(directory, "not a plain file name")


def test_tensor_in_two_files_or_in_the_wrong_one(damaged):
    directory = damaged("shards")
    index = json.loads((directory / INDEX_FILE).read_text())
    norm = {"model.norm.weight": read_tensors(directory)["model.norm.weight"]}
    write_tensors(directory, norm, "extra.safetensors")
    index["weight_map"]["extra.weight"] = "extra.safetensors"
    (directory / INDEX_FILE).write_text(json.dumps(index))
    _refused(directory, "model.norm.weight is in two files")
    (directory / "extra.safetensors").unlink()
    del index["weight_map"]["extra.weight"]
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00013.safetensors"
    (directory / INDEX_FILE).write_text(json.dumps(index))
    _refused(directory, "places model.norm.weight in model-00001-of-00013.safetensors, but it is in")
    index["weight_map"]["ghost"] = "model-00001-of-00013.safetensors"
    (directory / INDEX_FILE).write_text(json.dumps(index))
    _refused(directory, r"places (ghost|model.norm.weight) in")


def test_both_kinds_of_checkpoint_at_once(damaged):
    directory = damaged("shards")
    shutil.copy(directory / "model-00001-of-00013.safetensors", directory / SINGLE_FILE)
    _refused(directory, "has both")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda t: t | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(32)}, "unknown tensors: .*o_proj.bias"),
        (lambda t: {n: v for n, v in t.items() if "k_proj.bias" not in n}, "missing tensors: .*k_proj.bias"),
        (lambda t: t | {"model.norm.weight": torch.zeros(31)}, r"model.norm.weight has shape \[31\], expected \[32\]"),
        (lambda t: t | {"model.norm.weight": torch.zeros(32).to(torch.float64)}, "dtype F64; supported are"),
    ],
)
def test_wrong_tensors(damaged, change, pattern):
    directory = damaged("one")
    write_tensors(directory, change(read_tensors(directory)))
    _refused(directory, pattern)


def test_tied_head_in_the_file_must_equal_the_embedding(damaged):
    directory = damaged("tied")
    tensors = read_tensors(directory)
    table = tensors["model.embed_tokens.weight"]
    write_tensors(directory, tensors | {"lm_head.weight": table.clone()})
    checkpoint = HfCheckpoint.open(directory)
    checkpoint.check_tied_copy((0, 0), tuple(table.shape))
    other = table.clone()
    other[130, 31] += 1
    write_tensors(directory, tensors | {"lm_head.weight": other})
    with pytest.raises(HfCheckpointError, match="set tie_word_embeddings to false"):
        HfCheckpoint.open(directory).check_tied_copy((0, 0), tuple(table.shape))


def test_config_of_another_model(damaged):
    directory = damaged("one")
    edit_config(directory, num_hidden_layers=5, layer_types=["full_attention"] * 5)
    _refused(directory, r"missing tensors: model.layers.4")


def test_writer_refuses_wrong_streams(sources, tmp_path):
    checkpoint = HfCheckpoint.open(sources["one"])
    digests = {name: checkpoint.sha256(name) for name in checkpoint.tensors}
    manifest = HfManifest.of(checkpoint, sha256=digests)
    tensors = read_tensors(sources["one"])
    norm = tensors["model.norm.weight"]

    def refuse(stream, pattern):
        with pytest.raises(HfCheckpointError, match=pattern):
            write_hf_files(tmp_path, manifest, checkpoint.arch, stream, verify=True)
        assert list(tmp_path.iterdir()) == []

    refuse([(n, t) for n, t in tensors.items() if n != "model.norm.weight"], "1 tensors were never exported")
    refuse([*tensors.items(), ("model.norm.weight", norm)], "exported twice")
    refuse([("ghost", norm)], "not in the manifest")
    refuse([("model.norm.weight", norm[1:])], r"shape \[31\], expected \[32\]")
    refuse((tensors | {"model.norm.weight": norm + 1}).items(), "does not have the bytes")
