"""Training checkpoints from anywhere: what the checks that come before loading say.  See tests/hostile.py."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from contextlib import suppress

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_tropd.checkpoints.directory import find_checkpoint, latest_iteration
from megatron_tropd.checkpoints.integrity import verify_files
from megatron_tropd.checkpoints.known_logprobs import KNOWN_LOGPROBS_JSON, KnownLogprobs, read_known_logprobs
from megatron_tropd.checkpoints.metadata import CheckpointError, CheckpointMetadata, parse_metadata, record_file
from megatron_tropd.checkpoints.run_record import ModelRecord, RunRecord, read_run_record
from megatron_tropd.checkpoints.safety import ALLOWED, UnsafeCheckpoint, check_pickles, read_dcp_metadata
from megatron_tropd.models.hf_config import architecture_from_hf_config
from megatron_tropd.weights.files.plain_pickle import load_plain
from megatron_tropd.weights.files.torch_dist import ChunkFile, TorchDistReader, make_metadata, write_metadata
from megatron_tropd.weights.files.torch_dist_chunk import TorchDistError
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
    files = {
        path.relative_to(folder).as_posix(): record_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    arch = architecture_from_hf_config(BASES[4])
    about = CheckpointMetadata(iteration=3, architecture=arch, make_vocab_size_divisible_by=128, files=files)
    (folder / "checkpoint.json").write_text(about.to_json())
    (run / "latest_checkpointed_iteration.txt").write_text("3\n")
    return folder


def read_all(folder):
    """What the converters read."""
    metadata = read_dcp_metadata(folder)
    reader = TorchDistReader(folder, metadata)
    for name, (shape, dtype) in reader.tensors.items():
        if len(shape) and all(shape):
            reader.read_into(name, (0,) * len(shape), torch.empty(shape, dtype=dtype))
    reader.close()


def test_the_checkpoint_is_good(folder):
    read_all(folder)
    check_pickles(folder)
    verify_files(folder, parse_metadata(folder / "checkpoint.json"), digests=False)
    assert read_run_record(folder).models["teacher"].known == KNOWN == read_known_logprobs(folder.parent)
    assert parse_metadata(folder / "checkpoint.json").architecture == architecture_from_hf_config(BASES[4])


@pytest.fixture
def damaged(folder, tmp_path):
    return shutil.copytree(folder.parent, tmp_path / "run") / folder.name


TYPED = (CheckpointError, UnsafeCheckpoint, TorchDistError)


def test_bytes_of_the_metadata(damaged):
    path, make = damaged / ".metadata", Mutator("bytes of .metadata")
    good = [
        path.read_bytes(),
        *(pickle.dumps(load_plain(path.read_bytes(), ALLOWED), protocol) for protocol in (2, 3, 5)),
    ]
    with Trial(*TYPED) as trial:
        for number in range(1000):
            raw = make.bytes(good[number % len(good)])
            path.write_bytes(raw)
            trial.give(lambda: read_dcp_metadata(damaged), raw, names=str(path))
    trial.check(1000, accepted=0.02)


class Deep:
    """Fields of any object, for the mutator: the objects of ``.metadata`` as nested lists and dicts, and back."""

    @staticmethod
    def fields(value):
        """Every (holder, field) inside a value of ``.metadata``."""
        if isinstance(value, dict | list):
            for key, entry in list(value.items() if isinstance(value, dict) else enumerate(value)):
                yield value, key, entry
                yield from Deep.fields(entry)
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            for key, entry in list(vars(value).items()):
                yield value, key, entry
                yield from Deep.fields(entry)

    @staticmethod
    def put(holder, key, value):
        """Set a field, also of a frozen record."""
        if isinstance(holder, dict | list):
            holder[key] = value
        else:
            object.__setattr__(holder, key, value)


STRANGE = [
    None, True, 0, -1, 5, 10**12, 2**70, 0.5, float("nan"), "", "x", "../x", "/etc/passwd", "a/b", ".", "..", "a\0b", "\ud800", "x" * 300,
    b"x", [], [1], {}, {"x": 1}, (), (1, 2), (10**12, 10**12), torch.Size([3]), torch.Size([10**9, 10**9, 10**9]), torch.float32,
    torch.float64, BytesStorageMetadata(), MetadataIndex("decoder.a"), MetadataIndex("x", (0,)), _StorageInfo("__0_0.distcp", 0, 8),
    _StorageInfo("../../etc/passwd", 0, 8), _StorageInfo("__0_0.distcp", -8, 8), _StorageInfo("__0_0.distcp", 0, 10**15),
]  # fmt: skip


def test_values_of_the_metadata(damaged):
    """Records whose fields hold something else, or lack it."""
    path, draw = damaged / ".metadata", Mutator("values of .metadata").draw
    good = path.read_bytes()
    with Trial(*TYPED) as trial:
        for _ in range(800):
            metadata = load_plain(good, ALLOWED)
            for _ in range(draw.choice([1, 1, 2])):
                holder, key, old = draw.choice(list(Deep.fields(metadata)))
                value = draw.choice([*STRANGE, draw.choice(list(Deep.fields(metadata)))[2]])
                kind = draw.random()
                if kind < 0.8:
                    Deep.put(holder, key, value)
                elif isinstance(holder, dict):
                    with suppress(TypeError):  # a key that cannot be one
                        holder[value] = holder.pop(key)
                elif kind < 0.9 and not isinstance(holder, list):
                    object.__delattr__(holder, key)
                else:
                    Deep.put(holder, "chunks" if not isinstance(holder, list) else key, [old])
            with suppress(AttributeError, TypeError, RuntimeError):  # a record that cannot be pickled
                path.write_bytes(pickle.dumps(metadata))
            read = check_pickles if draw.random() < 0.3 else read_all
            trial.give(lambda read=read: read(damaged), path.read_bytes())
    trial.check(800)


def _setattr_of_a_class():
    """Sets a field of torch's own class, as BUILD can."""
    return b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n(N}\x8c\x07version\x8c\x04evilstb."


BOMBS = {
    "a far entry of the memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a far entry, as text": b"\x80\x02Np2147483647\n.",
    "bytes that are not there": b"\x80\x04\x8e" + (1 << 34).to_bytes(8, "little") + b".",
    "a byte array that is not there": b"\x80\x05\x96" + (1 << 34).to_bytes(8, "little") + b".",
    "a text that is not there": b"\x80\x04\x8d" + (1 << 34).to_bytes(8, "little") + b".",
    "an integer that is not there": b"\x80\x02\x8b" + (1 << 30).to_bytes(4, "little") + b".",
    "a frame that is not there": b"\x80\x04\x95" + (1 << 40).to_bytes(8, "little") + b"N.",
    "a large integer": b"\x80\x02\x8b" + (1 << 20).to_bytes(4, "little") + b"\x7f" * (1 << 20) + b".",
    "digits without end": b"\x80\x02I" + b"9" * (1 << 20) + b"\n.",
    "nesting": b"\x80\x02" + b"]" * 10_000 + b"a" * 9_999 + b".",
    "nested tuples as a key": b"\x80\x02}" + b"N" + b"\x85" * 10_000 + b"Ns.",
    "one list copied for ever": b"\x80\x02ctorch\nSize\n(" + b"K\x01" * 50_000 + b"tq\x00\x85R0" + b"ctorch\nSize\nh\x00\x85R0" * 50_000 + b"N.",
    "a field of a class": _setattr_of_a_class(),
    "a field of a function": b"\x80\x04ctorch.serialization\n_get_layout\n(N}\x8c\x0c__defaults__)stb.",
    "code": b"cposix\nmkdir\n(S'sentinel'\ntR.",
    "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickles_that_attack(damaged, bomb):
    """Refused at once, in no more memory than a small file takes, wherever a pickle is read."""
    for name in (".metadata", "common.pt"):
        if name == "common.pt":
            with zipfile.ZipFile(damaged / name, "w") as archive:
                archive.writestr("common/data.pkl", BOMBS[bomb])
                archive.writestr("common/version", "3\n")
                archive.writestr("common/byteorder", "little")
            refusal = check_pickles
        else:
            refusal = read_dcp_metadata
        good = (damaged / name).read_bytes() if name == ".metadata" else b""
        if name == ".metadata":
            (damaged / name).write_bytes(BOMBS[bomb])
        with Trial(*TYPED) as trial:
            trial.give(lambda refusal=refusal: refusal(damaged), bomb, names=str(damaged / name))
        assert trial.refused == 1 or (trial.accepted == 1 and name == "common.pt")
        if good:
            (damaged / name).write_bytes(good)
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.serialization import _get_layout

    assert Metadata.__dict__["version"] is None and _get_layout.__defaults__ is None


JSON_FILES = {
    "checkpoint.json": lambda folder: verify_files(folder, parse_metadata(folder / "checkpoint.json"), digests=False),
    "run.json": read_run_record,
    KNOWN_LOGPROBS_JSON: lambda folder: read_known_logprobs(folder.parent),
}


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_files(damaged, name):
    path, make = damaged / name, Mutator(name, odd=[float("inf"), [[1, 2]], "../latest_checkpointed_iteration.txt"])
    good = json.loads(path.read_text())
    with Trial(CheckpointError) as trial:
        for _ in range(500):
            raw = make.json(good)
            path.write_bytes(raw)
            trial.give(lambda: JSON_FILES[name](damaged), raw, names=str(damaged))
    trial.check(500, accepted=0.01)


def test_files_outside_of_the_checkpoint(damaged):
    """A checkpoint.json or a .metadata that names a file elsewhere, which is there."""
    outside = damaged.parent / "latest_checkpointed_iteration.txt"
    about = json.loads((damaged / "checkpoint.json").read_text())
    about["files"]["../" + outside.name] = {"bytes": 2, "sha256": record_file(outside).sha256}
    (damaged / "checkpoint.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="not a path inside"):
        parse_metadata(damaged / "checkpoint.json")
    (damaged / "link").symlink_to(outside)
    metadata = read_dcp_metadata(damaged)
    for name in ("../" + outside.name, str(outside), "link"):
        index = MetadataIndex("rng/shard_0")
        metadata.storage_data[index] = _StorageInfo(name, 0, 2)
        (damaged / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(UnsafeCheckpoint, match=r"not a plain file name|no file in the folder"):
            check_pickles(damaged)


def test_an_object_that_looks_like_a_tensor(damaged):
    """torch unpickles the bytes of such an entry without restriction: a field of a tensor does not make it one."""
    metadata = read_dcp_metadata(damaged)
    metadata.state_dict_metadata["rng/shard_0"].chunks = []
    metadata.state_dict_metadata["rng/shard_0"].size = torch.Size([1])
    (damaged / ".metadata").write_bytes(pickle.dumps(metadata))
    check_pickles(damaged)
    place = metadata.storage_data[MetadataIndex("rng/shard_0")]
    code = b"cposix\nmkdir\n(S'sentinel'\ntR."
    with (damaged / place.relative_path).open("r+b") as file:
        file.seek(place.offset)
        file.write(code + bytes(place.length - len(code)))
    with pytest.raises(UnsafeCheckpoint, match=r"object rng/shard_0 is damaged or holds more than plain data"):
        check_pickles(damaged)


def test_bytes_of_saved_objects(damaged):
    """common.pt, and an object in a .distcp file, with damaged bytes; torch reads what is accepted."""
    path, make = damaged / "common.pt", Mutator("common.pt")
    good = path.read_bytes()
    with Trial(UnsafeCheckpoint) as trial:
        for _ in range(300):
            raw = make.bytes(good)
            if make.draw.random() < 0.5:  # in the pickle, with a sum that is right
                raw = _resaved(good, make)
            path.write_bytes(raw)
            trial.give(lambda: check_pickles(damaged), raw, names=str(path))
    trial.check(300, accepted=0.02)


def _resaved(good, make):
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            data = source.read(name)
            archive.writestr(name, make.bytes(data) if name.endswith("data.pkl") else data)
    return target.getvalue()


def test_compressed_members_are_refused(damaged):
    """A thousand times their size comes out of a few megabytes."""
    with zipfile.ZipFile(damaged / "common.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("common/data.pkl", b"\x80\x02}." + bytes(8 << 20))
    with Trial(UnsafeCheckpoint) as trial:
        trial.give(lambda: check_pickles(damaged), "a bomb", names="compressed")
    assert trial.refused == 1


def test_trackers(damaged):
    tracker, make = damaged.parent / "latest_checkpointed_iteration.txt", Mutator("tracker")
    texts = [b"3", b"release", b"3\n", b"0000003", b" 3 ", *(str(value).encode(errors="surrogatepass") for value in ODD if not isinstance(value, Raw)),
             b"9" * 400, b"9" * 5000, "\u0663".encode(), "\u00b3".encode()]  # fmt: skip
    with Trial(CheckpointError) as trial:
        for number in range(400):
            raw = texts[number] if number < len(texts) else make.bytes(make.draw.choice(texts))
            tracker.write_bytes(raw)
            trial.give(
                lambda: (latest_iteration(damaged.parent), find_checkpoint(damaged.parent)), raw, names=tracker.name
            )
    trial.check(400, accepted=0.02)
