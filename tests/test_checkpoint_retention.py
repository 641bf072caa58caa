"""Which checkpoints are kept, what is removed and when, and that a replaced one is never missing."""

from __future__ import annotations

import errno
import os
import shutil

import pytest

from megatron_tropd.atomic_files import exchange
from megatron_tropd.checkpoints import save
from megatron_tropd.checkpoints.directory import (
    TRACKER_FILE,
    find_checkpoint,
    iterations,
    read_metadata,
    restore_replaced,
)
from megatron_tropd.checkpoints.integrity import check_sizes
from megatron_tropd.checkpoints.retention import Retention, remove_superseded
from megatron_tropd.cli import ConfigError
from tests.failing_disk import failing, rule
from tests.tiny_run import flags, make_world, train_here


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [10, 20, 30, 40, 45, 50]),
        ({"last": 1}, [50]),
        ({"last": 2}, [45, 50]),
        ({"last": 9}, [10, 20, 30, 40, 45, 50]),
        ({"interval": 20}, [20, 40, 50]),
        ({"last": 3, "interval": 30}, [30, 40, 45, 50]),
    ],
    ids=str,
)
def test_what_is_kept(settings, kept):
    saved = [10, 20, 30, 40, 45, 50]
    assert sorted(set(saved) - set(Retention(**settings).superseded(saved, 50))) == kept


def test_steps_that_are_made_again_are_no_newer_ones():
    assert Retention(last=2).superseded([10, 20, 30, 60], newest=30) == [10]


# With real checkpoints ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(ranks, world, tmp_path_factory):
    """A checkpoint after each of four steps."""
    run = tmp_path_factory.mktemp("trained") / "run"
    ranks(1).run(train_here, flags(world, run, save_interval=1))
    return run


@pytest.fixture
def saved(trained, tmp_path):
    return shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")


def test_a_run_deletes_as_it_goes(ranks, world, tmp_path):
    argv = flags(world, tmp_path / "run", save_interval=1, keep_last=1, save_retain_interval=2, train_iters=5)
    ranks(1).run(train_here, argv)
    assert iterations(tmp_path / "run/checkpoints") == [2, 4, 5]
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {
        TRACKER_FILE, "iter_0000002", "iter_0000004", "iter_0000005",
    }  # fmt: skip


@pytest.mark.parametrize("damage", ["missing file", "short file", "tracker", "manifest"])
def test_nothing_is_deleted_unless_the_new_one_is_whole(saved, damage):
    newest = saved / "iter_0000004"
    shard = next(newest.glob("*.distcp"))
    if damage == "missing file":
        shard.unlink()
    elif damage == "short file":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "tracker":
        (saved / TRACKER_FILE).write_text("3\n")
    else:
        (newest / "checkpoint.json").write_text("{")
    (warning,) = remove_superseded(saved, 4, Retention(last=1))
    assert "no earlier checkpoint was deleted, because the new one is not whole" in warning
    assert iterations(saved) == [1, 2, 3, 4]


def _remove_on_failing_disk(save_dir, pattern, call):
    """(warnings, failed calls, checkpoints that a reader then sees, warnings of a second try) of a disk that fails."""
    with failing(rule(pattern, call, errno.EIO, count=1)) as failures:
        warnings, failed = remove_superseded(save_dir, 4, Retention(last=1)), failures()
        left = iterations(save_dir)
    return warnings, failed, left, remove_superseded(save_dir, 4, Retention(last=1))


@pytest.mark.fault(number=6)
@pytest.mark.parametrize(
    ("pattern", "call", "step", "left"),
    [
        ("*/iter_0000002.tmp-*", "rename", 2, [2, 4]),
        ("*/checkpoints", "fsyncdir", 1, [4]),
        ("*/iter_0000002.tmp-*.distcp", "unlink", 2, [4]),
        ("*/iter_0000002.tmp-*", "unlink", 2, [4]),
    ],
    ids=["rename", "folder, fsync", "file", "folder"],
)
def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(disk, saved, pattern, call, step, left):
    """A reader sees all of it or none, the others are deleted, and one that has kept its name is later."""
    (warning,), failed, seen, again = disk.run(_remove_on_failing_disk, saved, pattern, call)
    assert failed == 1 and f"iter_000000{step} was not deleted: " in warning and "Input/output error" in warning
    assert seen == left and iterations(saved) == [4] and again == []
    check_sizes(find_checkpoint(saved, 4), read_metadata(saved, 4))


def test_an_interval_that_no_save_meets_is_refused(ranks, world, tmp_path):
    argv = flags(world, tmp_path / "run", save_interval=20, save_retain_interval=50)
    (error,) = ranks(1).run(_config_error, argv)
    assert "--save-retain-interval 50 is not a multiple of --save-interval 20" in error


def _config_error(argv):
    with pytest.raises(ConfigError) as caught:
        train_here(argv)
    return str(caught.value)


# Replacing ---------------------------------------------------------------------------------------


def test_two_folders_exchange_their_names(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    if not exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this file system cannot")
    assert (tmp_path / "one/file").read_text() == "other" and (tmp_path / "other/file").read_text() == "one"
    assert not exchange(tmp_path / "one", tmp_path / "missing")


@pytest.mark.parametrize("atomic", [True, False], ids=["exchanged", "moved away"])
def test_the_former_checkpoint_is_there_until_the_new_one_is(saved, monkeypatch, atomic):
    """The process ends at each of the system calls that change a name in turn."""
    final, calls = saved / "iter_0000004", ["rename", "replace"]
    for ending in range(5):
        new = shutil.copytree(final, saved / "iter_0000004.tmp-00000000")
        (new / "new").touch()
        metadata = save.parse_metadata(new / "checkpoint.json")
        count = iter(range(10))
        with monkeypatch.context() as patched:
            patched.setattr(save, "exchange", exchange if atomic else lambda *_: False)
            for name in calls:
                patched.setattr(os, name, _ending(getattr(os, name), count, ending))
            ended = False
            try:
                save._publish(saved, new, 4, metadata)
            except KeyboardInterrupt:
                ended = True
        if not atomic:
            restore_replaced(saved)
        assert (find_checkpoint(saved) / "checkpoint.json").is_file()
        for left in saved.glob("*.tmp-*"):
            shutil.rmtree(left)
        (final / "new").unlink(missing_ok=True)
        if not ended:
            return
    raise AssertionError("the save never came to its end")


def _ending(call, count, at):
    def instead(*args):
        if next(count) == at:
            raise KeyboardInterrupt
        return call(*args)

    return instead
