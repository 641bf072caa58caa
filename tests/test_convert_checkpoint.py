"""Training checkpoints: complete or invisible, any layout in and out, clear errors on every rank."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_tropd.checkpoints.directory import hf_directory, latest_iteration, read_metadata
from megatron_tropd.checkpoints.load import load_checkpoint
from megatron_tropd.checkpoints.metadata import CheckpointError
from megatron_tropd.checkpoints.save import save_checkpoint
from megatron_tropd.checkpoints.state import load_model_state
from megatron_tropd.models.hf_config import load_architecture
from megatron_tropd.parallel.groups import release_groups
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint
from tests.hf_models import read_tensors, save_hf_checkpoint

# Run on every rank -------------------------------------------------------------------------------


def _model(hf, layout, *, weights: bool):
    from megatron_tropd.models.build import build_gpt_model
    from megatron_tropd.parallel.groups import student_groups
    from megatron_tropd.weights.files.load import load_hf_into

    release_groups()
    checkpoint = HfCheckpoint.open(hf)
    model = build_gpt_model(checkpoint.arch, student_groups(layout), params_dtype=torch.float32)
    if weights:
        load_hf_into(model, checkpoint, checkpoint.arch, layout, dist.get_rank())
    return checkpoint.arch, model


def _save(hf, layout, save_dir, iteration, common=None):
    arch, model = _model(hf, layout, weights=True)
    common = common or {"cursor": {"epoch": 1}, "seed": 2**40}
    save_checkpoint(save_dir, iteration, {"model": model.sharded_state_dict()}, common, arch=arch, hf_sidecar=hf)
    return sorted(p.name for p in Path(save_dir).iterdir())


def _load_and_export(hf, layout, load_dir, iteration=None):
    """Load into a fresh model of another layout; compare every HF tensor with the source."""
    from megatron_tropd.weights.coordinates.parameters import local_parameters
    from megatron_tropd.weights.transport.hf_export import export_hf

    arch, model = _model(hf, layout, weights=False)
    state, common = load_checkpoint(load_dir, iteration, {"model": model.sharded_state_dict()}, arch=arch)
    load_model_state(model, state["model"])
    exported = dict(export_hf(local_parameters(model), arch, layout, dist.group.WORLD))
    for name, tensor in read_tensors(hf).items():
        assert torch.equal(exported[name], tensor), name
    return common


def _error(function, *args):
    """The error message this rank gets."""
    with pytest.raises(CheckpointError) as caught:
        function(*args)
    return str(caught.value)


def _save_error_when_rank_1_cannot_write(hf, layout, save_dir):
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    if dist.get_rank() == 1:
        filesystem_async.open = full_disk
    try:
        return _error(_save, hf, layout, save_dir, 2)
    finally:
        vars(filesystem_async).pop("open", None)


def _save_not_plain(hf, layout, save_dir):
    return _error(_save, hf, layout, save_dir, 3, {"layout": layout})  # an object, not plain data


# Tests -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return save_hf_checkpoint(tmp_path_factory.mktemp("hf"), "llama_tied")


@pytest.fixture(scope="module")
def saved(hf, tmp_path_factory, ranks):
    """A run directory with iterations 1 and 2, saved at TP 2, tied embeddings."""
    save_dir = tmp_path_factory.mktemp("run")
    for iteration in (1, 2):
        ranks(2).run(_save, hf, ParallelLayout(tp=2), save_dir, iteration)
    return save_dir


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def test_directory_is_megatrons(saved, hf):
    names = {"iter_0000001", "iter_0000002", "latest_checkpointed_iteration.txt"}
    assert {p.name for p in saved.iterdir()} == names
    assert (saved / "latest_checkpointed_iteration.txt").read_text() == "2\n"
    assert latest_iteration(saved) == 2
    metadata = read_metadata(saved)
    assert metadata.iteration == 2
    assert metadata.architecture == load_architecture(hf)
    folder = saved / "iter_0000002"
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files - {"checkpoint.json"} == metadata.files.keys()
    carried = hf_directory(saved)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (carried / name).read_bytes() == (hf / name).read_bytes()
    assert not list(carried.glob("*.safetensors"))


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2)])
def test_any_layout_reads_it(ranks, saved, hf, tp, pp, dp):
    layout = ParallelLayout(tp=tp, pp=pp, dp=dp)
    common = ranks(layout.world_size).run(_load_and_export, hf, layout, saved)
    assert common == [{"cursor": {"epoch": 1}, "seed": 2**40}] * layout.world_size


def test_an_older_iteration_can_be_named(ranks, saved, hf):
    ranks(1).run(_load_and_export, hf, ParallelLayout(), saved, 1)


def test_saving_again_replaces_and_sweeps(ranks, run, hf):
    (run / "iter_0000003.tmp-dead").mkdir()
    (run / "iter_0000003.tmp-dead" / "half").write_text("written")
    (run / "notes.tmp-mine").mkdir()
    names = ranks(2).run(_save, hf, ParallelLayout(pp=2), run, 2)[0]
    assert names == ["iter_0000001", "iter_0000002", "latest_checkpointed_iteration.txt", "notes.tmp-mine"]
    ranks(1).run(_load_and_export, hf, ParallelLayout(), run)


def test_a_failed_save_leaves_the_one_before(ranks, run, hf):
    before = (run / "iter_0000002" / "checkpoint.json").read_bytes()
    errors = ranks(2).run(_save_error_when_rank_1_cannot_write, hf, ParallelLayout(tp=2), run)
    assert "No space left on device" in errors[0]
    assert errors[0] == errors[1]
    assert (run / "iter_0000002" / "checkpoint.json").read_bytes() == before
    assert latest_iteration(run) == 2
    errors = ranks(2).run(_save_not_plain, hf, ParallelLayout(tp=2), run)
    assert errors[0] == errors[1]
    assert "the common state" in errors[0]
    ranks(1).run(_load_and_export, hf, ParallelLayout(), run)


def _damage_tracker(run, text):
    (run / "latest_checkpointed_iteration.txt").write_text(text)


def _flip_a_bit(run):
    path = sorted((run / "iter_0000002").glob("*.distcp"))[0]
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


class _Payload:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


def _poison(run, file):
    import pickle

    path = run / "iter_0000002" / file
    if file == "common.pt":
        torch.save({"payload": _Payload(run / "sentinel")}, path)
    else:
        path.write_bytes(pickle.dumps(_Payload(run / "sentinel")))
    _rerecord(run / "iter_0000002", file)


def _rerecord(folder, file):
    """Make checkpoint.json agree with a file that was replaced (an attacker would)."""
    from dataclasses import replace

    from megatron_tropd.checkpoints.metadata import parse_metadata, record_file

    metadata = parse_metadata(folder / "checkpoint.json")
    files = metadata.files | {file: record_file(folder / file)}
    (folder / "checkpoint.json").write_text(replace(metadata, files=files).to_json())


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


FAULTS = {
    "empty tracker": (lambda run: _damage_tracker(run, ""), r"latest_checkpointed_iteration.txt is empty"),
    "bad tracker": (lambda run: _damage_tracker(run, "abc"), r"'abc'; expected an iteration number"),
    "missing iteration": (
        lambda run: _damage_tracker(run, "7"),
        r"names iteration 7, but .*iter_0000007 does not exist; the directory has iter_0000001, iter_0000002",
    ),
    "no tracker": (
        lambda run: (run / "latest_checkpointed_iteration.txt").unlink(), r"has no latest_checkpointed_iteration.txt",
    ),
    "no checkpoint.json": (lambda run: (run / "iter_0000002/checkpoint.json").unlink(), r"checkpoint.json is missing"),
    "bad checkpoint.json": (lambda run: _truncate(run / "iter_0000002/checkpoint.json"), r"checkpoint.json is damaged"),
    "no .metadata": (lambda run: (run / "iter_0000002/.metadata").unlink(), r"\.metadata is missing"),
    "no common.pt": (lambda run: (run / "iter_0000002/common.pt").unlink(), r"common\.pt is missing"),
    "short .metadata": (lambda run: _truncate(run / "iter_0000002/.metadata"), r"\.metadata has \d+ bytes, \d+ were"),
    "flipped bit": (_flip_a_bit, r"distcp is damaged: its sha256 is"),
    "code in common.pt": (lambda run: _poison(run, "common.pt"), r"common\.pt is damaged or holds more than plain"),
    "code in .metadata": (lambda run: _poison(run, ".metadata"), r"refers to posix.mkdir"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.fault(number=8)
@pytest.mark.fault(number=9)
def test_faults_are_the_same_error_on_every_rank(ranks, run, hf, fault):
    damage, pattern = FAULTS[fault]
    damage(run)
    errors = ranks(2).run(_error, _load_and_export, hf, ParallelLayout(tp=2), run)
    assert errors[0] == errors[1]
    with pytest.raises(CheckpointError, match=pattern):
        raise CheckpointError(errors[0])
    assert not (run / "sentinel").exists()


def test_another_architecture(ranks, saved, tmp_path):
    other = save_hf_checkpoint(tmp_path / "other", "llama", intermediate_size=64)
    errors = ranks(2).run(_error, _load_and_export, other, ParallelLayout(tp=2), saved)
    assert errors[0] == errors[1]
    assert "checkpoint of another architecture: it has ffn_hidden_size 48 (not 64)" in errors[0]
