"""The rank of a torchrun job that ends in the way its arguments say; run by tests/test_job_end.py.

torchrun ... -m tests.ending_job WAY RANK
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from megatron_tropd.parallel.job_end import EXIT_FAILED, End, JobEnd, Terminated, describe
from megatron_tropd.parallel.stop_request import StopRequest


def _end_of(error: BaseException) -> End:
    return End(text=f"END OF {describe(error)}", exit_code=EXIT_FAILED, summary=type(error).__name__)


def _ready() -> None:
    """Write the file of this rank, whole."""
    part = Path(f"part_{os.environ['RANK']}")
    part.write_text(str(os.getpid()))
    part.rename(f"ready_{os.environ['RANK']}")


def _wait() -> None:
    """Wait in Python for a signal; ready when the file of this rank is there."""
    _ready()
    while True:
        signal.pause()


def _save_when_asked(end: JobEnd) -> int:
    request = StopRequest()
    with end.saving_first(request, 200.0):
        _ready()
        while request.why is None:
            time.sleep(0.01)
        Path(f"saved_{os.environ['RANK']}").touch()
    return 0


def _act(way: str, mine: bool, end: JobEnd) -> int:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    if way == "cause" and mine:
        raise KeyError("the cause")
    if way == "alike":
        raise ValueError("the cause")
    if way == "killed" and mine:
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "signal":
        _wait()
    if way.startswith("saving"):
        return _save_when_asked(end)
    if way == "stuck":
        _ready()
        dist.recv(torch.zeros(1), src=1 - dist.get_rank())  # nobody sends; no instruction of Python comes any more
    if way == "late cause":
        if mine:
            os.kill(os.getpid(), signal.SIGTERM)
        try:
            _wait()
        except Terminated:
            if mine:
                raise
            raise KeyError("the cause") from None
    dist.barrier()  # breaks when the other rank ends
    return 0


def main() -> int:
    """Run the command line."""
    end = JobEnd(_end_of)
    return end.run(lambda: _act(sys.argv[1], os.environ["RANK"] == sys.argv[2], end))


if __name__ == "__main__":
    sys.exit(main())
