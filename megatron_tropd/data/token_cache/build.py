"""The shards of a token cache, made by every process that wants it, each shard by one of them.

A process takes a shard by locking its file; the lock of a process that dies is free at once, and another process makes
the shard.  So the ranks of a node (and of several nodes that share the directory) divide the work without talking to
each other, finished shards survive a crash, and a second run that wants the same tokens helps or waits.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import filelock

from megatron_tropd.atomic_files import remove_unfinished
from megatron_tropd.data.encoding.encode import Encoder
from megatron_tropd.data.reading.sources import DataFile
from megatron_tropd.data.reading.spans import Span, spans_of
from megatron_tropd.data.token_cache.finish import Summary, finish, read_summary
from megatron_tropd.data.token_cache.shard import make_shard, read_record

FORMAT = 2
"""Raised when older caches must not be read; they are made again under another name."""
_SAY_EVERY_S = 10.0
_PROBE_BYTES = 1 << 12

Say = Callable[[str], None]


class CacheError(ValueError):
    """The cache cannot be written."""


def default_root() -> Path:
    """Return where token caches are kept unless --data-cache-path says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "megatron_tropd" / "tokens"


def cache_key(files: Sequence[DataFile], encoder: Encoder) -> str:
    """Return the name of the cache of these files: a hash of how they are encoded, and of each file its path, size,
    time of change and first and last bytes."""
    state = [FORMAT, encoder.fingerprint(), *(part for file in files for part in _file_state(file))]
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()[:32]


def _file_state(file: DataFile) -> list[str | int]:
    path = Path(file.path)
    parts = sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]
    state: list[str | int] = [file.path, str(path.resolve()), file.kind]  # messages name the file as it was given
    for part in parts:
        try:
            stat = part.stat()
            with part.open("rb") as stream:
                ends = stream.read(_PROBE_BYTES)
                stream.seek(max(0, stat.st_size - _PROBE_BYTES))
                ends += stream.read(_PROBE_BYTES)
            state += [part.name, stat.st_size, stat.st_mtime_ns, hashlib.sha256(ends).hexdigest()]
        except OSError as error:
            state.append(str(error))
    return state


def open_cache(root: Path, files: Sequence[DataFile], encoder: Encoder, say: Say) -> tuple[Path, Summary]:
    """Return the directory and the summary of the finished cache of ``files``, after making it if it is not there.

    Every process that calls this at one time does a part of the work, and returns when all of it is done.

    Raises:
        CacheError: the directory cannot be written or locked.
    """
    directory = root / cache_key(files, encoder)
    if summary := _finished(directory):
        return directory, summary
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return directory, _build(directory, files, encoder, say)
    except (OSError, NotImplementedError) as error:
        raise CacheError(
            f"--data-cache-path {root}: tokens cannot be stored there ({error}); name a directory with space that "
            "this user can write and whose file system has locks"
        ) from error


def _finished(directory: Path) -> Summary | None:
    """Return the summary if every shard that it speaks of is whole."""
    summary = read_summary(directory)
    if summary is None or not (directory / "uids.npy").is_file():
        return None
    whole = all(read_record(directory, index) is not None for index in range(len(summary.kept)))
    return summary if whole else None


def _build(directory: Path, files: Sequence[DataFile], encoder: Encoder, say: Say) -> Summary:
    spans = [span for file in files for span in spans_of(file)]
    share_cores()
    started = time.monotonic()
    _make_shards(directory, spans, encoder, say)
    with _locked(directory / "summary.lock", wait=True):
        if summary := _finished(directory):
            return summary
        records = [read_record(directory, index) for index in range(len(spans))]
        assert all(records), "a finished shard disappeared"
        remove_unfinished(directory)
        summary = finish(directory, [record for record in records if record])
    if time.monotonic() - started > _SAY_EVERY_S:
        say(f"tokenized {summary.num_rows:,} rows in {time.monotonic() - started:.0f} s; kept in {directory}")
    return summary


def _make_shards(directory: Path, spans: Sequence[Span], encoder: Encoder, say: Say) -> None:
    """Make the shards that no other process makes, then wait for the others, taking over from one that died."""
    first = _share(len(spans))
    order = [*range(first, len(spans)), *range(first)]
    said = time.monotonic()
    for wait in (False, True):
        for index in order:
            if read_record(directory, index):
                continue
            with _locked(directory / f"{index:05d}.lock", wait=wait) as mine:
                if mine and not read_record(directory, index):
                    make_shard(directory, index, spans[index], encoder)
            if time.monotonic() - said > _SAY_EVERY_S:
                said = time.monotonic()
                done = sum(read_record(directory, other) is not None for other in range(len(spans)))
                say(f"tokenizing the data: {done} of {len(spans)} parts")


def _share(count: int) -> int:
    """Return the shard at which this rank begins, so that ranks do not meet at the first one."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return rank * count // max(world, 1) % max(count, 1)


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock; gives False where another process has it and ``wait`` is false."""
    lock = filelock.FileLock(str(path), timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def share_cores() -> None:
    """Let the ranks of a node divide its cores: fast tokenizers take all of them in every process otherwise."""
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
