"""Model directories from anywhere: config.json, tokenizers, safetensors headers and indexes.  See tests/hostile.py."""

from __future__ import annotations

from megatron_tropd.models.architecture import UnsupportedArchitecture
from megatron_tropd.models.hf_config import ModelShape, load_architecture, load_hf_config
from megatron_tropd.weights.files.hf_checkpoint import read_headers
from megatron_tropd.weights.files.safetensors_header import HfCheckpointError
from tests.hostile import Mutator, Trial
from tests.test_hf_files_mutated import BASES


def test_config(tmp_path):
    path = tmp_path / "config.json"
    make = Mutator("config")
    with Trial(ValueError, FileNotFoundError, UnsupportedArchitecture) as trial:
        for number in range(2500):
            raw = make.json(BASES[number % len(BASES)])
            path.write_bytes(raw)
            trial.give(lambda: load_architecture(tmp_path), raw, names=str(path))
    trial.check(2500)


def test_shape(tmp_path):
    path = tmp_path / "config.json"
    make = Mutator("shape")
    with Trial(ValueError, FileNotFoundError, UnsupportedArchitecture) as trial:
        for number in range(1000):
            base = BASES[number % len(BASES)]
            raw = make.json({"model_type": "qwen2_vl", "text_config": base} if number % 3 == 0 else base)
            path.write_bytes(raw)
            trial.give(lambda: ModelShape.of_config(load_hf_config(tmp_path), str(path)), raw, names=str(path))
    trial.check(1000)


TENSORS = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "F32", "shape": [], "data_offsets": [32, 36]},
}


def test_header(tmp_path):
    path = tmp_path / "model.safetensors"
    make = Mutator("header")
    with Trial(HfCheckpointError) as trial:
        for _ in range(1500):
            header = make.json(TENSORS)
            raw = len(header).to_bytes(8, "little") + header + bytes(36)
            if make.draw.random() < 0.15:
                raw = make.bytes(raw)
            path.write_bytes(raw)
            trial.give(lambda: read_headers(tmp_path), raw, names="model.safetensors")
    trial.check(1500)
