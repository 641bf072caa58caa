"""Training checkpoints from anywhere: what the checks that come before loading say.  See tests/hostile.py."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_tropd.checkpoints.directory import find_checkpoint, latest_iteration
from megatron_tropd.checkpoints.known_logprobs import KNOWN_LOGPROBS_JSON, KnownLogprobs, read_known_logprobs
from megatron_tropd.checkpoints.integrity import verify_files
from megatron_tropd.checkpoints.metadata import CheckpointError, CheckpointMetadata, parse_metadata, record_file
from megatron_tropd.checkpoints.run_record import ModelRecord, RunRecord, read_run_record
from megatron_tropd.checkpoints.safety import UnsafeCheckpoint, check_pickles, read_dcp_metadata
from megatron_tropd.models.hf_config import architecture_from_hf_config
from megatron_tropd.weights.files.torch_dist import ChunkFile, TorchDistReader, make_metadata, write_metadata
from tests.hostile import ODD, Mutator, Raw, Trial
from tests.test_hf_files_mutated import BASES

TENSORS = {"decoder.a": (4, 3), "decoder.b": (5,), "optimizer.c": ()}
COMMON = {"iteration": 3, "args": {"lr": 1e-3, "names": ["a", "b"], "none": None, "flag": True}, "big": 2**40,
          "raw": b"abc\xff", "rng": torch.arange(6, dtype=torch.uint8), "t": torch.ones(2, 3)}  # fmt: skip
KNOWN = KnownLogprobs(sequences=((1, 2, 3), (4, 5)), logprobs=((-1.5, float("-inf")), (-2.0,)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with tensors, an object and all small files, in a run directory."""
    run = tmp_path_factory.mktemp("run")
    folder = run / "iter_0000003"
    folder.mkdir()
    file = ChunkFile(folder, 0)
    for name, shape in TENSORS.items():
        file.add(name, (0,) * len(shape), torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape))
    saved = io.BytesIO()
    torch.save(COMMON, saved)
    file.add_object("rng/shard_0", saved.getvalue())
    metadata = make_metadata([file.close()], {name: (shape, torch.float32) for name, shape in TENSORS.items()})
    write_metadata(folder, metadata)
    torch.save(COMMON, folder / "common.pt")
    record = RunRecord(
        settings={"lr": 1e-3, "prompt-data": ["a.jsonl"], "bf16": True}, code="0.2.0, commit abc", prompts="12", answers="",
        models={"student": ModelRecord(digest="34"), "teacher": ModelRecord(digest="56", known=KNOWN)},
    )  # fmt: skip
    (folder / "run.json").write_text(record.to_json())
    (folder / KNOWN_LOGPROBS_JSON).write_text(KNOWN.to_json())
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(BASES[0]))
    files = {path.relative_to(folder).as_posix(): record_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    arch = architecture_from_hf_config(BASES[4])
    about = CheckpointMetadata(iteration=3, architecture=arch, make_vocab_size_divisible_by=128, files=files)
    (folder / "checkpoint.json").write_text(about.to_json())
    (run / "latest_checkpointed_iteration.txt").write_text("3\n")
    return folder


def read_all(folder):
    """The checks that come before a tensor is loaded, and the reader of the converters."""
    check_pickles(folder)
    metadata = read_dcp_metadata(folder)
    reader = TorchDistReader(folder, metadata)
    for name, (shape, dtype) in reader.tensors.items():
        if len(shape) and all(shape):
            reader.read_into(name, (0,) * len(shape), torch.empty(shape, dtype=dtype))
    reader.close()


def test_the_checkpoint_is_good(folder):
    read_all(folder)
    verify_files(folder, parse_metadata(folder / "checkpoint.json"), digests=False)
    assert read_run_record(folder).models["teacher"].known == KNOWN == read_known_logprobs(folder.parent)
    assert parse_metadata(folder / "checkpoint.json").architecture == architecture_from_hf_config(BASES[4])


@pytest.fixture
def damaged(folder, tmp_path):
    return shutil.copytree(folder.parent, tmp_path / "run") / folder.name


TYPED = (CheckpointError, UnsafeCheckpoint, ValueError)


def test_bytes_of_the_metadata(damaged):
    path, make = damaged / ".metadata", Mutator("bytes of .metadata")
    good = [path.read_bytes(), *(pickle.dumps(pickle.loads(path.read_bytes()), protocol) for protocol in (2, 3, 5))]
    with Trial(*TYPED) as trial:
        for number in range(1500):
            raw = make.bytes(good[number % len(good)])
            path.write_bytes(raw)
            trial.give(lambda: read_dcp_metadata(damaged), raw, names=str(path))
    trial.check(1500, accepted=0.02)
