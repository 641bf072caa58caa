"""A process group beside the default one, between processes that share no other group.

A trainer rank and an engine's worker each have a world of their own (``init_process_group`` can be called once
in a process).  A side group is made from a store and a back end directly and leaves both worlds alone.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist

Backend = Literal["gloo", "nccl"]
LOOPBACK = "127.0.0.1"
JOIN_TIMEOUT_S = 120.0
"""Time within which all ranks of a group must join; transfers have a timeout of their own."""


def host_store(*, host: str = LOOPBACK, port: int = 0, timeout_s: float) -> dist.TCPStore:
    """Host the store through which the ranks of side groups find each other; its ``.port`` is the port in use.

    One process hosts it for as long as a group lives.  It listens on the address ``host`` only.  It has no
    authentication: keep it on loopback or on a private network.
    """
    listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    chosen = listener.getsockname()[1]
    # Given only a port, TCPStore would listen on every address of the machine.  It closes the descriptor itself.
    return dist.TCPStore(
        host, chosen, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False,
        master_listen_fd=listener.detach(), use_libuv=True,
    )  # fmt: skip


def join_store(*, host: str = LOOPBACK, port: int, timeout_s: float) -> dist.TCPStore:
    """Connect to the store that another process hosts.

    Raises:
        ConnectionError: no store answered in time.
    """
    try:
        return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    except (dist.DistError, RuntimeError) as error:
        raise ConnectionError(f"no store of a side group answers at {host}:{port} within {timeout_s:g} s") from error


def side_group(
    store: dist.Store, *, name: str, rank: int, world_size: int, backend: Backend, timeout_s: float,
    address: str = LOOPBACK,
) -> Any:  # fmt: skip
    """Join the group ``name`` (new for every group of a store).  Blocks until all ``world_size`` ranks have joined.

    Args:
        address: This rank's own address, by which the others reach it (gloo only).

    Returns:
        The bare back end: it has ``send``, ``recv``, ``rank`` and ``size``; functions of ``torch.distributed``
        do not accept it.

    Raises:
        ConnectionError: not all ranks joined in time.
        ValueError: torch was built without NCCL.
    """
    mine = dist.PrefixStore(name, store)
    timeout = timedelta(seconds=timeout_s)
    if backend == "nccl":
        if not dist.is_nccl_available():
            raise ValueError("this torch has no NCCL; use gloo for weights in host memory")
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return dist.ProcessGroupNCCL(mine, rank, world_size, nccl)
    options: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stubs lack it
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    try:
        return dist.ProcessGroupGloo(mine, rank, world_size, options)
    except RuntimeError as error:
        raise ConnectionError(
            f"rank {rank} of side group {name!r}: not all {world_size} ranks joined within {timeout_s:g} s ({error})"
        ) from error
