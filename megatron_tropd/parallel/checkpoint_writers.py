"""How Megatron-core writes checkpoints: in threads where there is no CUDA, with errors that say why, and in the
background."""

from __future__ import annotations

import functools
import inspect
import multiprocessing.process
import queue
import threading
from collections.abc import Sequence
from typing import Any

import torch

REPLACED: dict[str, tuple[str, ...]] = {
    "megatron.core.dist_checkpointing.strategies.filesystem_async": ("mp",),
    "megatron.core.dist_checkpointing.strategies.async_utils": ("mp",),
    "megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync": ("write_preloaded_data",),
}
"""What is replaced, as in platform.py."""


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
