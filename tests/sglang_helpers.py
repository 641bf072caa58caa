"""Two real SGLang servers on a CPU, shared by all tests that need one (fixture ``sglang`` of conftest.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.models.hf_config import load_architecture
from megatron_tropd.rollout.engine import SamplingParams
from megatron_tropd.rollout.sglang.pool import SGLangPool
from megatron_tropd.sglang.settings import Keys, SGLangSettings
from megatron_tropd.types import GenerationRequest, Rollout
from megatron_tropd.weights.engine_loader import LOADER
from tests.hf_models import VOCAB_SIZE, make_hf_model, save_hf_checkpoint

PYTHON = Path(__file__).resolve().parent.parent / ".venv-sglang" / "bin" / "python"
NO_SGLANG = f"{PYTHON} does not exist; `make sglang-env` makes it"
needs_sglang = pytest.mark.skipif(not PYTHON.exists(), reason=NO_SGLANG)
KEYS = Keys(api="test-key-for-generation", admin="test-key-for-weights")
STOP = 2


@dataclass(slots=True)
class Student:
    """What the trainer would hold: a model whose weights can be changed, and how to export them."""

    model: torch.nn.Module
    version: int = 0
    seed: int = 0

    def change(self) -> int:
        """New random weights; returns their version."""
        self.version += 1
        self.seed += 1
        self.model = make_hf_model("qwen3", seed=self.seed)
        return self.version

    def export(self):
        return iter(self.model.state_dict().items())


@dataclass(slots=True)
class Servers:
    settings: SGLangSettings
    arch: Architecture
    student: Student
    pool: SGLangPool

    def push(self) -> int:
        """Give both servers new weights."""
        version = self.student.change()
        self.pool.push(self.student.export, version)
        return version

    @property
    def engines(self):
        return self.pool._fleet.engines

    def run(self, coroutine):
        """Await something of an engine, on the pool's loop."""
        return self.pool._loop.run(coroutine)

    def other_pool(self, **changes) -> SGLangPool:
        """Another pool on the same servers, which it did not start: weights travel as bytes."""
        settings = replace(self.settings, urls=tuple(engine.server.url for engine in self.engines))
        return make_pool(settings, self.arch, self.student, **changes)


def make_pool(settings: SGLangSettings, arch: Architecture, student: Student, **changes) -> SGLangPool:
    defaults = {
        "arch": arch, "stop_token_ids": {STOP}, "vocab_size": VOCAB_SIZE, "export": student.export,
    }  # fmt: skip
    return SGLangPool(settings, **{**defaults, **changes})


def start_servers(directory: Path) -> Servers:
    hf_dir = save_hf_checkpoint(directory / "hf", "qwen3")
    arch = load_architecture(hf_dir)
    settings = SGLangSettings(
        hf_dir=hf_dir, log_dir=directory / "logs", dtype="float32", python=PYTHON, num_servers=2, keys=KEYS,
        bucket_bytes=100_000, max_concurrent_prompts=4, start_timeout_s=300, request_timeout_s=120,
        weight_loader=LOADER,
    )  # fmt: skip
    student = Student(make_hf_model("qwen3"))
    return Servers(settings=settings, arch=arch, student=student, pool=make_pool(settings, arch, student))


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"seed": 3, "step": 5, **changes})


def requests_of(num_prompts: int, *, samples: int = 1, max_new: int = 12, guidance: int = 2) -> list[GenerationRequest]:
    """Different prompts of different lengths, the last tokens of each being guidance."""
    generator = torch.Generator().manual_seed(11)
    requests = []
    for uid in range(num_prompts):
        length = 4 + uid
        tokens = tuple(torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist())
        for sample in range(samples):
            requests.append(
                GenerationRequest(
                    prompt_uid=uid, sample_index=sample, token_ids=tokens, prompt_len=length - guidance,
                    guidance_len=guidance, max_new_tokens=max_new,
                )
            )  # fmt: skip
    return requests


@torch.no_grad()
def reference_logprobs(model: torch.nn.Module, token_ids) -> list[float]:
    """Log-probability of every token but the first, by transformers."""
    log_probs = torch.log_softmax(model(torch.tensor([list(token_ids)])).logits[0].double(), dim=-1)
    return [float(log_probs[i - 1, token]) for i, token in enumerate(token_ids) if i]


@torch.no_grad()
def greedy(model: torch.nn.Module, token_ids, max_new: int) -> list[int]:
    """What transformers' model writes at temperature 0, the stop token included."""
    ids = list(token_ids)
    for _ in range(max_new):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == STOP:
            break
    return ids[len(token_ids) :]


def check_rollouts(rollouts: list[Rollout], requests: list[GenerationRequest], model, version: int) -> float:
    """Every request has its rollout, by ``version``; returns the worst error of a log-probability."""
    assert [(r.prompt_uid, r.sample_index) for r in rollouts] == [(r.prompt_uid, r.sample_index) for r in requests]
    worst = 0.0
    for rollout, request in zip(rollouts, requests, strict=True):
        assert rollout.token_ids[: len(request.token_ids)] == request.token_ids
        assert rollout.weight_version == (version, version)
        if rollout.logprobs:
            reference = reference_logprobs(model, rollout.token_ids)[-len(rollout.logprobs) :]
            worst = max(worst, *(abs(a - b) for a, b in zip(reference, rollout.logprobs, strict=True)))
    return worst
