"""Model directories from anywhere: config.json, tokenizers, safetensors headers and indexes.  See tests/hostile.py."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from megatron_tropd.data.tokenizer import eos_token_ids, load_tokenizer
from megatron_tropd.models.architecture import UnsupportedArchitecture
from megatron_tropd.models.hf_config import ModelShape, load_architecture, load_hf_config
from megatron_tropd.models.rope import inverse_frequencies
from megatron_tropd.weights.files.hf_checkpoint import read_headers
from megatron_tropd.weights.files.hf_manifest import MANIFEST_FILE, HfManifest
from megatron_tropd.weights.files.safetensors_header import HfCheckpointError, make_header
from tests.hf_models import save_tokenizer
from tests.hostile import Findings, Mutator, Trial, dump
from tests.test_hf_files_mutated import BASES, OTHER_KEYS

CONFIGS = [{**base, "torch_dtype": "bfloat16", "eos_token_id": [2], "architectures": ["X"]} for base in BASES]


def _config(make, number):
    """The bytes of a config with mistakes, sometimes in a key that it did not have."""
    base = CONFIGS[number % len(CONFIGS)]
    if make.draw.random() < 0.25:
        base = {**base, make.draw.choice(OTHER_KEYS): make.odd()}
        return dump(base)
    return make.json(base)


def test_config(tmp_path):
    """What is accepted can be used: its layouts are checked and its RoPE is computed."""
    path, make = tmp_path / "config.json", Mutator("config")

    def use():
        arch = load_architecture(tmp_path)
        assert isinstance(arch.check_layout(2, 2), list)
        if arch.head_dim < 10_000:
            own = 1.0 / (arch.rope_theta ** (torch.arange(0, arch.head_dim, 2, dtype=torch.float32) / arch.head_dim))
            inverse_frequencies(own, arch)

    with Trial(ValueError, UnsupportedArchitecture, quotes="which transformers refuses: ") as trial:
        for number in range(1000):
            raw = _config(make, number)
            path.write_bytes(raw)
            trial.give(use, raw, names=str(path))
    trial.check(1000)


def test_shape(tmp_path):
    """What is read of a model that only servers run."""
    path, make = tmp_path / "config.json", Mutator("shape")
    with Trial(ValueError) as trial:
        for number in range(600):
            base = CONFIGS[number % len(CONFIGS)]
            raw = make.json({"model_type": "qwen2_vl", "text_config": base} if number % 3 == 0 else base)
            path.write_bytes(raw)
            trial.give(lambda: ModelShape.of_config(load_hf_config(tmp_path), str(path)), raw, names=str(path))
    trial.check(600)


HEADER = {
    "__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}, "c": {"dtype": "F32", "shape": [], "data_offsets": [32, 36]},
}  # fmt: skip


def test_headers(tmp_path):
    path, make = tmp_path / "model.safetensors", Mutator("header")
    with Trial(HfCheckpointError) as trial:
        for _ in range(1000):
            header = make.json(HEADER)
            raw = len(header).to_bytes(8, "little") + header + bytes(36)
            path.write_bytes(make.bytes(raw) if make.draw.random() < 0.15 else raw)
            trial.give(lambda: read_headers(tmp_path), raw, names=path.name)
    trial.check(1000, accepted=0.02)


def test_indexes(tmp_path):
    index, make = (
        tmp_path / "model.safetensors.index.json",
        Mutator("index", odd=["1.safetensors", "config.json", "folder"]),
    )
    (tmp_path / "folder").mkdir()
    for number, name in enumerate("ab"):
        header = make_header({name: (2, 2)}, torch.float32, "x")
        (tmp_path / f"{number}.safetensors").write_bytes(header.prefix + bytes(header.data_bytes))
    good = {"metadata": {"total_size": 32}, "weight_map": {"a": "0.safetensors", "b": "1.safetensors"}}
    with Trial(HfCheckpointError) as trial:
        for _ in range(500):
            raw = make.json(good)
            index.write_bytes(raw)
            trial.give(lambda: read_headers(tmp_path), raw, names="safetensors")
    trial.check(500)


def test_manifests(tmp_path):
    """hf_manifest.json, from which an export writes files: none of them outside of its directory."""
    path, make = tmp_path / MANIFEST_FILE, Mutator("manifest", odd=[json.dumps(HEADER), {"../x": json.dumps(HEADER)}])
    headers = {f: make_header({f[0]: (2, 2)}, torch.float32, f) for f in ("a.safetensors", "b.safetensors")}
    index = json.dumps({"metadata": {}, "weight_map": {name: f"{name}.safetensors" for name in "ab"}})
    good = HfManifest(headers=headers, index_text=index, sha256={"a": "0" * 64}, vocab_size=7, left_aside=("c",))
    path.write_text(good.to_json())
    assert HfManifest.load(tmp_path) == good

    def use():
        found = HfManifest.load(tmp_path)
        assert all("/" not in name for name in found.headers) and HfManifest.from_json(found.to_json()) == found

    with Trial(HfCheckpointError) as trial:
        for _ in range(500):
            raw = make.json(json.loads(good.to_json()))
            path.write_bytes(raw)
            trial.give(use, raw, names=MANIFEST_FILE)
    trial.check(500)


def test_tokenizers(tmp_path):
    save_tokenizer(tmp_path / "good", 40)
    (tmp_path / "good" / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    good = {path.name: json.loads(path.read_text()) for path in (tmp_path / "good").iterdir()}
    directory, make = shutil.copytree(tmp_path / "good", tmp_path / "tokenizer"), Mutator("tokenizer")
    with Trial(ValueError, quotes="cannot be read: ") as trial:
        for number in range(150):
            name = sorted(good)[number % len(good)]
            raw = make.json(good[name])
            (directory / name).write_bytes(raw)
            trial.give(lambda: eos_token_ids(directory), (name, raw), names=str(directory))
            (directory / name).write_text(json.dumps(good[name]))
    trial.check(150)


def test_a_directory_in_the_place_of_each_file(tmp_path):
    save_tokenizer(tmp_path, 40)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[0]))
    header = make_header({"a": (2, 2)}, torch.float32, "x")
    (tmp_path / "model.safetensors").write_bytes(header.prefix + bytes(header.data_bytes))
    readers = (load_architecture, load_tokenizer, read_headers)
    with Trial(FileNotFoundError, ValueError, HfCheckpointError, quotes="cannot be read: ") as trial:
        for path in sorted(tmp_path.iterdir()):
            raw = path.read_bytes()
            path.unlink()
            path.mkdir()
            trial.give(lambda: [read(tmp_path) for read in readers], path.name, names=str(tmp_path))
            path.rmdir()
            path.write_bytes(raw)
    assert (trial.refused, trial.tried) == (3, 4)  # tokenizer_config.json may be missing


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (lambda: {}["x"], "KeyError"),
        (lambda: int("9" * 5000), "is not named"),
        (lambda: json.loads("{"), "JSONDecodeError, a kind of the allowed ValueError"),
        (lambda: [[0] * 64_000_000], "MiB of memory"),
        (lambda: list(range(10**11)), "MemoryError"),
        (lambda: [None for _ in iter(int, 1)], "no end after"),
        (lambda: _raise(ValueError("the file: a \ud800")), "cannot be printed"),
        (lambda: _raise(ValueError("the file: KeyError('x')")), "Python's own errors"),
        (lambda: _raise(_Panic("the file")), "_Panic"),
    ],
)
def test_the_harness_sees_faults(fault, seen, monkeypatch):
    """Each kind of fault that the tests on hostile files look for, made on purpose."""
    monkeypatch.setattr("tests.hostile.CPU_SECONDS", 0.3)
    with pytest.raises(Findings, match=seen), Trial(ValueError) as trial:
        trial.give(fault, "input", names="the file")


class _Panic(BaseException):
    """As a library in Rust raises it."""


def _raise(error):
    raise error
