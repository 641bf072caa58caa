"""Real SGLang servers on a CPU that hold a teacher, for tests of ``--teacher-placement server``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_tropd.models.hf_config import load_architecture, load_hf_config
from megatron_tropd.sglang.loop_thread import LoopThread
from megatron_tropd.sglang.server.process import ServerProcess
from megatron_tropd.sglang.server_flags import TEACHER_FLAGS
from megatron_tropd.sglang.settings import ServerSettings
from megatron_tropd.teacher.server.fleet import TeacherFleet
from megatron_tropd.teacher.server.server import TeacherModel, TeacherServer
from megatron_tropd.types import Rollout
from tests.hf_models import VOCAB_SIZE, make_hf_model
from tests.sglang_helpers import PYTHON, reference_logprobs

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


class Fleet:
    """A fleet on a loop of its own, and what it says of rollouts."""

    def __init__(self, hf_dir: Path, logs: Path, **changes) -> None:
        self.loop = LoopThread("test")
        self.fleet = TeacherFleet(settings_of(hf_dir, logs, **changes), model_of(hf_dir), owns=True)
        self.loop.run(self.fleet.open())

    def up(self) -> Fleet:
        self.loop.run(self.fleet.until_up())
        return self

    def begin(self, rollouts):
        return [
            self.loop.begin(
                self.fleet.ask(len(r.token_ids), lambda server, r=r: server.score(r, 5))  # type: ignore[misc]
            )
            for r in rollouts
        ]

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_) -> None:
        self.loop.run(self.fleet.close())
        self.loop.close()


def rollouts_to_score(number: int, length: int = 60) -> list[Rollout]:
    generator = torch.Generator().manual_seed(number)
    return [
        Rollout(prompt_uid=uid, sample_index=0, prompt_len=4, guidance_len=2, weight_version=(0, 0), finish="stop",
                token_ids=tuple(torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist()),
                logprobs=(0.0,) * (length - 6))
        for uid in range(number)
    ]  # fmt: skip


def check_scores(rollouts, futures) -> None:
    """All are scored, as transformers scores them."""
    model = make_hf_model("qwen3")
    for rollout, future in list(zip(rollouts, futures, strict=True)):
        scores = future.result(timeout=300)
        expected = reference_logprobs(model, rollout.token_ids)[rollout.prompt_len - 1 :]
        assert (scores.logprob - torch.tensor(expected)).abs().max() < 1e-5
        assert scores.topk_ids.shape == (len(rollout.logprobs), 5)
