"""Real SGLang servers on a CPU that hold a teacher, for tests of ``--teacher-placement server``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_tropd.models.hf_config import load_architecture, load_hf_config
from megatron_tropd.sglang.server.process import ServerProcess
from megatron_tropd.sglang.server_flags import TEACHER_FLAGS
from megatron_tropd.sglang.settings import ServerSettings
from megatron_tropd.teacher.server.server import TeacherModel, TeacherServer
from tests.sglang_helpers import PYTHON

FLAGS = ("--max-total-tokens", "2048", "--max-running-requests", "16")


def settings_of(hf_dir: Path, log_dir: Path, **changes) -> ServerSettings:
    return ServerSettings(**{
        "names": TEACHER_FLAGS, "hf_dir": hf_dir, "log_dir": log_dir, "dtype": "float32", "python": PYTHON,
        "start_timeout_s": 300, "request_timeout_s": 120, "flags": FLAGS, **changes,
    })  # fmt: skip


def model_of(hf_dir: Path, **changes) -> TeacherModel:
    arch = load_architecture(hf_dir)
    return TeacherModel(**{
        "arch": arch, "model_type": load_hf_config(hf_dir)["model_type"], "common_vocab_size": arch.vocab_size,
        "longest": 40, **changes,
    })  # fmt: skip


@contextlib.contextmanager
def serving(hf_dir: Path, directory: Path, number: int) -> Iterator[list[ServerProcess]]:
    """Servers of somebody else, from a run's point of view: up, and known by their URL."""
    settings, model = settings_of(hf_dir, directory, num_servers=number), model_of(hf_dir)
    handles = [ServerProcess(settings, i, model.arch.max_position_embeddings) for i in range(number)]

    async def wait_until_up(handle: ServerProcess) -> None:
        server = TeacherServer(0, settings, model, None, handle.url)
        await server.start()
        await server.wait_until_up()
        await server.close()

    try:
        for handle in handles:
            handle.start()
        for handle in handles:
            asyncio.run(wait_until_up(handle))
        yield handles
    finally:
        for handle in handles:
            handle.stop()
