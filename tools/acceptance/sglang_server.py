"""Section i: a real SGLang server: seconds of an update by each transport, and equal log-probabilities after it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.models.build import build_gpt_model
from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.rollout.sglang.planned.push import PlannedPush, TrainerWeights
from megatron_tropd.rollout.sglang.pool import SGLangPool
from megatron_tropd.sglang.settings import SGLangSettings
from megatron_tropd.teacher.megatron import MegatronTeacher
from megatron_tropd.weights.coordinates.parameters import local_parameters
from megatron_tropd.weights.engine_loader import LOADER
from megatron_tropd.weights.transport.hf_export import HfExporter

from .device import clocked, one_rank, wait
from .report import Report
from .setting import Setting
from .shapes import QWEN3_0_6B, TINY, stop_token, write_hf_config
from .weights import fill_megatron

PARITY = {torch.bfloat16: 0.1, torch.float32: 1e-3}
"""Mean difference in nats: --parity-limit's own values."""
REPEATS = 2
"""Updates by one transport; the first one may make connections."""
PROBES, PROBE_TOKENS = 4, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """A model with random weights that can be changed, and what the engines get of it."""

    arch: Architecture
    groups: ModelGroups
    params: dict[str, Tensor]
    scorer: MegatronTeacher
    exporter: HfExporter

    @classmethod
    def make(cls, arch: Architecture, groups: ModelGroups, dtype: torch.dtype) -> Trainer:
        """Return one whose weights are arbitrary until :meth:`change`."""
        model = build_gpt_model(arch, groups, params_dtype=dtype)
        scorer = MegatronTeacher(
            model, groups, vocab_size=arch.vocab_size, max_tokens_per_microbatch=4096, logits_chunk_tokens=1024
        )
        exporter = HfExporter(arch, groups.layout, 0, dtype=dtype)
        return cls(arch=arch, groups=groups, params=local_parameters(model), scorer=scorer, exporter=exporter)

    def change(self, version: int) -> None:
        """Take the random checkpoint ``version``."""
        fill_megatron(self.params, self.arch, self.groups.layout, 0, version=version)
        wait()

    def export(self) -> Iterator[tuple[str, Tensor]]:
        """Export whole tensors."""
        return self.exporter.export(self.params, self.groups.world)


def run(report: Report, setting: Setting) -> None:
    """See the module."""
    if not setting.sglang_python:
        report.not_run("SGLang", "no SGLang: --sglang-python names no interpreter that has it")
        return
    arch = replace(TINY, max_position_embeddings=512) if setting.tiny else QWEN3_0_6B
    dtype = torch.bfloat16 if setting.cuda else torch.float32
    with tempfile.TemporaryDirectory(prefix="tropd-acceptance-") as folder:
        settings = SGLangSettings(
            hf_dir=write_hf_config(arch, Path(folder) / "hf"), log_dir=setting.directory / "sections" / "sglang",
            dtype="bfloat16" if setting.cuda else "float32", python=Path(setting.sglang_python), cuda=setting.cuda,
            weight_loader=LOADER, start_timeout_s=setting.seconds * 0.6, request_timeout_s=60.0,
            flags=("--mem-fraction-static", "0.4") if setting.cuda else (),
        )  # fmt: skip
        _Run(report, settings, Trainer.make(arch, one_rank(), dtype), dtype).everything()


class _Run:
    def __init__(self, report: Report, settings: SGLangSettings, trainer: Trainer, dtype: torch.dtype) -> None:
        self._report, self._settings, self._trainer, self._dtype = report, settings, trainer, dtype
        self._version = 0

    def everything(self) -> None:
        """Start a server, and update it in every way."""
        with closing(self._pool(self._settings)) as pool:
            _, seconds = clocked(lambda: self._push(pool))
            self._report.measured("start of a server and the first update", seconds, unit=" s")
            # No public name: a pool tells nobody where its own servers are.
            url = pool._servers.engines[0].server.url  # type: ignore[union-attr]
            elsewhere = replace(self._settings, urls=(url,))
            for transport in ("shared", "bytes"):
                settings = replace(elsewhere, transport=transport)  # type: ignore[arg-type]
                self._measure(transport, lambda settings=settings: self._pool(settings))  # type: ignore[misc]
            # On one GPU NCCL cannot send from one process to another: planned messages need gloo, so a CPU.
            for shared in (True,) if self._settings.cuda else (True, False):
                name = "planned-shared" if shared else "planned"
                self._measure(name, lambda shared=shared: self._planned(elsewhere, shared))  # type: ignore[misc]

    def _pool(self, settings: SGLangSettings, planned: PlannedPush | None = None) -> SGLangPool:
        arch = self._trainer.arch
        return SGLangPool(
            settings, arch=arch, stop_token_ids=[stop_token(arch)], vocab_size=arch.vocab_size,
            export=self._trainer.export, planned=planned,
        )  # fmt: skip

    def _planned(self, settings: SGLangSettings, shared: bool) -> SGLangPool:
        trainer = self._trainer
        weights = TrainerWeights(layout=trainer.groups.layout, params=lambda: trainer.params)
        return self._pool(settings, PlannedPush(settings, trainer.arch, weights, shared=shared))

    def _push(self, pool: SGLangPool) -> None:
        self._version += 1
        self._trainer.change(self._version)
        pool.push(self._trainer.export, self._version)

    def _measure(self, transport: str, make: Callable[[], SGLangPool]) -> None:
        with self._report.attempt(f"update by {transport}"), closing(make()) as pool:
            taken = []
            for _ in range(REPEATS):
                self._version += 1
                self._trainer.change(self._version)
                taken.append(clocked(lambda: pool.push(self._trainer.export, self._version))[1])
            said = ", ".join(f"{seconds:.3f}" for seconds in taken)
            failed = pool.counts.get("planned_failed", 0)
            self._report.measured(f"update by {transport}", taken[-1], form=".3f", unit=" s", reason=f"each: {said} s")
            if transport.startswith("planned"):
                self._report.limit(f"update by {transport}: plans that failed", failed, 0, form=".0f")
            self._report.limit(
                f"update by {transport}: mean difference of trainer's and engine's log-probabilities, {self._dtype}",
                self._parity(pool), PARITY[self._dtype], unit=" nats",
            )  # fmt: skip

    def _parity(self, pool: SGLangPool) -> float:
        sequences = _probes(self._trainer.arch)
        ours = self._trainer.scorer.logprobs_of(sequences, vocab_size=self._trainer.arch.vocab_size)
        (theirs,) = pool.score(sequences, self._version).values()
        gaps = [abs(a - b) for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True)]
        return math.fsum(gaps) / len(gaps)


def _probes(arch: Architecture) -> Sequence[Sequence[int]]:
    generator = torch.Generator().manual_seed(17)
    tokens: list[list[int]] = torch.randint(1, stop_token(arch), (PROBES, PROBE_TOKENS), generator=generator).tolist()
    return tokens
