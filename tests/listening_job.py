"""A rank of a torchrun job that says what its node listens on; run by tests/test_listening.py.

torchrun ... -m tests.listening_job FILE
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from megatron_tropd.parallel.groups import init_distributed, shutdown
from megatron_tropd.parallel.roles import another_connection


def listening(process: psutil.Process) -> list[tuple[str, int]]:
    """Address and port of every TCP socket on which the process, or one of its children, waits for connections."""
    processes = [process, *process.children(recursive=True)]
    sockets = [one for each in processes for one in each.net_connections(kind="tcp")]
    return sorted({(str(one.laddr.ip), one.laddr.port) for one in sockets if one.status == psutil.CONN_LISTEN})


def main() -> int:
    """Join the job, use its groups and its store, and write the sockets of torchrun and of all ranks."""
    rank, size = init_distributed(60.0)
    pair = dist.new_group(list(range(size)), backend="gloo")
    total = torch.ones(1)
    dist.all_reduce(total, group=pair)
    another_connection(60.0).set(f"said by {rank}", str(int(total)))
    dist.barrier()
    assert another_connection(60.0).get(f"said by {size - 1 - rank}") == str(size).encode()
    if rank == 0:
        said = {
            "sockets": listening(psutil.Process(os.getppid())), "master port": int(os.environ["MASTER_PORT"]),
            "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        }  # fmt: skip
        Path(sys.argv[1]).write_text(json.dumps(said))
    dist.barrier()
    del pair
    shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
