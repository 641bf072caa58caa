"""File systems without locks, without an exchange of names, without fsync of directories, and read-only ones; forced by
the preloaded library of tests/failing_disk.c."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from megatron_tropd.checkpoints.directory import iterations
from tests.disk_saves import curve, on_two_ranks
from tests.failing_disk import failing, rule
from tests.tiny_run import flags, make_world

pytestmark = [pytest.mark.slow, pytest.mark.fault(number=30)]
NO_LOCKS = [
    pytest.param(errno.ENOLCK, id="ENOLCK"),
    *(
        pytest.param(number, id=errno.errorcode[number], marks=pytest.mark.thorough)
        for number in (errno.ENOTSUP, errno.ENOSYS)
    ),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def _lock_twice(path: Path, number: int) -> tuple[bool, str]:
    """Whether the record says that the kernel holds the lock, and why a second job gets none."""
    from megatron_tropd.reporting.lock import RunDirectoryBusyError, RunLock

    with failing(rule("*/run.lock", "flock", number)):
        lock = RunLock(path)
        try:
            RunLock(path)
        except RunDirectoryBusyError as error:
            return json.loads(path.read_text())["kernel"], str(error)
        finally:
            lock.release()
    return False, ""


@pytest.mark.parametrize("number", NO_LOCKS)
def test_without_flock_the_record_in_the_file_holds_the_directory(disk, tmp_path, number):
    kernel, refused = disk.run(_lock_twice, tmp_path / "run.lock", number)
    assert not kernel and "is in use by process" in refused


def _read_prompts(folder: Path, number: int) -> str:
    from megatron_tropd.data.prompts import load_prompts
    from megatron_tropd.data.tokenizer import load_tokenizer
    from tests.test_data_prompts import FORMAT

    tokenizer = load_tokenizer(folder / "world" / "student")
    with failing(rule("*/cache/*", "flock", number)):
        try:
            prompts = load_prompts(
                [str(folder / "world" / "train.jsonl")], tokenizer, FORMAT, cache_root=folder / "cache"
            )
        except ValueError as error:
            return str(error)
    return f"{len(prompts)} prompts"


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_token_cache_without_locks_is_refused_or_works_and_does_not_wait_for_ever(disk, world, tmp_path, number):
    (tmp_path / "world").symlink_to(world)
    found = disk.run(_read_prompts, tmp_path, number)
    assert found == "24 prompts" or ("--data-cache-path" in found and "whose file system has locks" in found), found


def test_a_run_on_a_file_system_that_has_none_of_these(disk, world, tmp_path):
    """No exchange of names, no flock, no fsync of directories: it trains, saves a step twice and goes on from it, bit
    for bit."""
    poor = [
        rule("*/run/*", "renameat2", errno.EINVAL), rule("*/run/*", "flock", errno.ENOLCK),
        rule("*/run*", "fsyncdir", errno.EINVAL),
    ]  # fmt: skip
    common = {"train_iters": 3, "save_interval": 1}
    whole = disk.run(curve, flags(world, tmp_path / "whole", **common))[0]
    argv = flags(world, tmp_path / "run", **common)
    assert disk.run(curve, argv, 2, *poor)[0] == whole[:2]
    (tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").write_text("1\n")
    assert disk.run(curve, argv, None, *poor)[0] == whole[1:], "step 2 is saved where a checkpoint of it is"
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir() if path.is_dir()) == [
        f"iter_000000{step}" for step in (1, 2, 3)
    ]


def _mend_beside(argv: list[str], holds: bool) -> str:
    """The error of a launch that finds a checkpoint moved away, while another job holds the directory or not."""
    from megatron_tropd.cli import parse
    from megatron_tropd.reporting.lock import RunLock
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training.checkpointing import Checkpoints

    config = make_run_spec(parse(argv), 1).config
    lock = RunLock(Path(config.logging.run_dir) / "run.lock") if holds else None
    try:
        found = Checkpoints(config, None, Path(), "").resume_origin()
        return f"step {found.step}"
    except ValueError as error:
        return str(error)
    finally:
        if lock:
            lock.release()


def test_a_checkpoint_that_is_being_replaced_is_mended_only_under_the_lock(disk, world, tmp_path):
    """A job is between its two renames when a second one starts: that one must not give the name back."""
    argv = flags(world, tmp_path / "run", train_iters=2, save_interval=1)
    disk.run(curve, argv, 1)
    saved = tmp_path / "run/checkpoints"
    (saved / "iter_0000001").rename(saved / "iter_0000001.tmp-0a0b0c0d-old")
    assert "is in use by process" in disk.run(_mend_beside, argv, True)
    assert iterations(saved) == [], "the job that holds the directory is not disturbed"
    assert disk.run(_mend_beside, argv, False) == "step 1" and iterations(saved) == [1]


def _create(path: Path, number: int) -> str:
    from megatron_tropd.cli import ConfigError, parse
    from megatron_tropd.setup.run_files import open_files

    with failing(rule(f"{path}*", "open,mkdir,rename", number)):
        try:
            open_files(parse(["--run-dir", str(path), "--hf-checkpoint", "x", "--prompt-data", "y"]), None)
        except ConfigError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("exists", [True, False])
def test_a_read_only_run_directory_is_one_configuration_error(disk, tmp_path, exists):
    path = tmp_path / "run"
    if exists:
        path.mkdir()
    error = disk.run(_create, path, errno.EROFS)
    assert f"--run-dir {path}" in error and os.strerror(errno.EROFS) in error
    assert not exists or not list(path.iterdir())


@pytest.mark.thorough
def test_a_directory_that_becomes_read_only_ends_the_run_at_the_save(disk, world, tmp_path):
    """Until then the log waits in memory; the checkpoint before is intact."""
    argv = flags(world, tmp_path / "run", train_iters=3, save_interval=1, tensor_model_parallel_size=2)
    disk.run(on_two_ranks, curve, argv, 1)
    before = {
        path: path.read_bytes() for path in (tmp_path / "run/checkpoints/iter_0000001").rglob("*") if path.is_file()
    }
    rules = [rule("*/run/checkpoints*", "open,mkdir,rename,unlink", errno.EROFS)]
    one, other = disk.run(on_two_ranks, curve, argv, None, *rules)
    assert one[1] == other[1] and os.strerror(errno.EROFS) in one[1] and "have it mounted for writing" in one[1], one
    assert {path: path.read_bytes() for path in before} == before
    shutil.rmtree(tmp_path / "run")
