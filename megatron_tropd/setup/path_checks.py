"""Check the directories that a run writes, before hours of work depend on them; nothing is made or written."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from megatron_tropd.config import TrainConfig
from megatron_tropd.flag_values import shortened
from megatron_tropd.setup.problems import Problems


def check_directories(config: TrainConfig, problems: Problems) -> None:
    """Check that what the flags name is a directory or can be made one, and that directories to write are writable."""
    written = {
        "--run-dir": config.logging.run_dir,
        "--save": config.checkpoint.save,
        "--emergency-save": config.checkpoint.emergency_save,
        "--tensorboard-dir": config.logging.tensorboard_dir,
        "--data-cache-path": config.data.data_cache_path,
    }
    for flag, path in {**written, "--load": config.checkpoint.load}.items():
        if path and (fault := _fault(path, writes=flag in written)):
            problems.errors.append(f"{flag} {shortened(path, 200)}: {fault}")


def _fault(path: str, *, writes: bool) -> str:
    """Return why ``path`` cannot be used; empty if it can."""
    try:
        existing = _nearest(Path(path).absolute())
        if not stat.S_ISDIR(existing.stat().st_mode):
            name = "it" if existing == Path(path).absolute() else str(existing)
            return f"{name} is a file, not a directory"
        if any(len(os.fsencode(part)) > os.pathconf(existing, "PC_NAME_MAX") for part in Path(path).parts):
            return os.strerror(errno.ENAMETOOLONG)  # below a directory that does not exist yet
    except OSError as error:  # a loop of links, a name that is too long, a directory that may not be read
        return error.strerror or str(error)
    if writes and not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} may not be written"
    return ""


def _nearest(path: Path) -> Path:
    """Return ``path``, or the nearest directory or file above it that exists.

    Raises:
        OSError: the path cannot be followed.
    """
    for place in (path, *path.parents):
        try:
            place.stat()
            return place
        except (FileNotFoundError, NotADirectoryError):
            if place.is_symlink():
                raise  # a link to nothing: the directory cannot be made in its place
    return path
