"""How Megatron-core writes checkpoints: in threads where there is no CUDA, with errors that say why, and in the
background."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import multiprocessing.process
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.atomic_files import writing

REPLACED: dict[str, tuple[str, ...]] = {
    "megatron.core.dist_checkpointing.strategies.filesystem_async": ("mp",),
    "megatron.core.dist_checkpointing.strategies.async_utils": ("mp",),
    "megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync": (
        "write_preloaded_data", "finish",
    ),
    "megatron.core.dist_checkpointing.serialization": ("save_config",),
}  # fmt: skip
"""What is replaced, as in platform.py; with megatron-core 0.16 its ``TorchCommonSaveStrategy.save_common`` too."""


class _ThreadContext:
    """The part of a multiprocessing context that Megatron's checkpoint writer uses, with threads."""

    Queue: Any = staticmethod(queue.Queue)
    JoinableQueue: Any = Queue

    @staticmethod
    def Process(*, target: Any, args: Sequence[Any] = (), kwargs: dict[str, Any]) -> threading.Thread:
        return threading.Thread(target=target, args=args, kwargs=kwargs, daemon=True)

    def Manager(self) -> _ThreadContext:
        return self

    def get_context(self, _method: str) -> _ThreadContext:
        return self


def use_threads() -> None:
    """Let the checkpoint writer use threads, which are beside the training in an asynchronous save.  It forks a process
    that has gloo and OpenMP threads, which was seen to hang, and starts a manager process, which takes seconds."""
    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    filesystem_async.mp = async_utils.mp = _ThreadContext()


def async_calls_queue() -> Any:
    """Return Megatron's queue of asynchronous saves, each in a process of its own (on a CPU, a thread)."""
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    return AsyncCallsQueue()


def end_processes(queue: Any) -> None:
    """Kill the processes that write for a queue of :func:`async_calls_queue`; a thread ends with this process.

    Not run: it needs CUDA.
    """
    for call in queue.async_calls:
        process = getattr(call.async_caller, "process", None)
        if isinstance(process, multiprocessing.process.BaseProcess):
            process.kill()
            process.join()


def async_save_options() -> dict[str, Any]:
    """Return the arguments with which ``dist_checkpointing.save`` returns a request for :func:`async_calls_queue`."""
    from megatron.core import dist_checkpointing

    named = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters  # by later versions than 0.16
    return {"async_sharded_save": True, **({"async_strategy": "mcore"} if named else {})}


def copying(request: Any) -> Any:
    """Let a request of an asynchronous save write copies of tensors that are in host memory already: Megatron copies
    those on a GPU only, and a thread, unlike a forked process, would see what the optimizer changes."""
    if torch.cuda.is_available() or request.preload_fn is None:
        return request
    original = request.preload_fn

    def preload() -> Any:
        return [
            (path, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, key, (data, tensors) in original()
        ]

    return request._replace(preload_fn=preload)


def tell_errors() -> None:
    """Let a failed save say why: megatron-core 0.19 names only the type of an error of its last writer, which is the
    only one unless a save asks for several threads."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    original = FileSystemWriterAsync.write_preloaded_data

    @functools.wraps(original)
    def write(*args: Any, results_queue: Any, **kwargs: Any) -> Any:
        output = original(*args, results_queue=results_queue, **kwargs)
        if results_queue is None and output is not None and isinstance(output[1], Exception):
            raise output[1]
        return output

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write)


_put_aside: list[Exception] = []
"""Errors of this process in the save that is being made."""


def put_errors_aside() -> None:
    """Let every rank come to the end of a save in which rank 0 could not write a file of its own.

    Megatron writes ``common.pt``, ``.metadata`` and ``metadata.json`` on rank 0, each between two collectives.  An
    error there would leave the other ranks waiting in the second one until its timeout.
    """
    from megatron.core.dist_checkpointing import serialization
    from megatron.core.dist_checkpointing.strategies import common
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    serialization.save_config = putting_aside(serialization.save_config)
    FileSystemWriterAsync.finish = putting_aside(FileSystemWriterAsync.finish)
    if strategy := getattr(common, "TorchCommonSaveStrategy", None):  # later versions than 0.16 write no such file
        strategy.save_common = putting_aside(_save_common)


def _save_common(_strategy: object, state: Any, checkpoint_dir: str) -> None:
    if torch.distributed.get_rank() == 0:
        write_object(state, Path(checkpoint_dir) / "common.pt")


def write_object(value: Any, path: Path) -> None:
    """As ``torch.save``, whose writer, in C++, does not say why a file cannot be written.

    Raises:
        CannotWrite: the error names the file.
    """
    data = io.BytesIO()
    torch.save(value, data)
    with writing(path):
        path.write_bytes(data.getbuffer())


def putting_aside(write: Callable[..., None]) -> Callable[..., None]:
    """Return ``write``, whose error :func:`raising_what_was_put_aside` raises."""

    @functools.wraps(write)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            write(*args, **kwargs)
        except Exception as error:
            _put_aside.append(error)

    return run


@contextlib.contextmanager
def raising_what_was_put_aside() -> Iterator[None]:
    """Raise, after the block, the first error that was put aside in it.  The block is collective, the error is not."""
    _put_aside.clear()
    yield
    if _put_aside:
        raise _put_aside[0]
