"""Which rollout engines a run has, and how they are made."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.config import TrainConfig
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.exchange import broadcast_object, gather_objects
from megatron_tropd.rollout.embedded import EmbeddedEngine
from megatron_tropd.rollout.pool import EnginePool
from megatron_tropd.rollout.sglang.pool import SGLangPool
from megatron_tropd.rollout.sglang.settings import SGLangSettings, load_keys
from megatron_tropd.teacher.preflight import TokenizerReport
from megatron_tropd.training.sources import ModelSource

Export = Callable[[], Iterable[tuple[str, Tensor]]]
"""The student's current weights by HF name, collectively over the world."""

RolloutEngines = EnginePool | SGLangPool


def sglang_settings(config: TrainConfig, student: ModelSource) -> SGLangSettings | None:
    """How the SGLang servers of this run are run; None without --rollout-engine sglang.

    Raises:
        ValueError: a setting that cannot be used; nothing has been started.
        OSError: the key file cannot be read.
    """
    engine = config.engine
    if engine.rollout_engine != "sglang":
        return None
    return SGLangSettings(
        hf_dir=student.hf_dir.absolute(),
        log_dir=Path(config.logging.run_dir).absolute() / "engines",
        dtype="bfloat16" if config.model.bf16 else "float32",
        python=Path(engine.sglang_python or sys.executable).absolute(),
        num_engines=engine.rollout_num_engines,
        urls=tuple(engine.rollout_engine_urls),
        host=engine.sglang_host,
        keys=load_keys(file=Path(engine.sglang_key_file) if engine.sglang_key_file else None),
        tp_size=engine.sglang_tp_size,
        gpu_ids=_gpu_ids(engine.rollout_gpu_ids),
        flags=tuple(word for name, words in config.sglang_flags.items() for word in (f"--{name}", *words)),
        cuda=platform.is_cuda(),
        transport=engine.update_weight_transport,
        bucket_bytes=engine.update_weight_buffer_size,
        start_timeout_s=engine.sglang_start_timeout,
        request_timeout_s=engine.sglang_request_timeout,
    )


def _gpu_ids(given: Sequence[str]) -> tuple[int, ...]:
    if wrong := [gpu for gpu in given if not gpu.isdecimal()]:
        raise ValueError(f"--rollout-gpu-ids {' '.join(wrong)}: expected numbers of GPUs, such as 4 5 6 7")
    return tuple(map(int, given))


def make_engines(
    config: TrainConfig, student: ModelSource, tokens: TokenizerReport, dtype: torch.dtype, export: Export
) -> RolloutEngines:
    """Engines without weights; the first push fills them.  Collective over the world."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if settings := sglang_settings(config, student):
        return SGLangPool(
            settings, arch=student.arch, stop_token_ids=tokens.stop_ids, vocab_size=tokens.common_vocab_size,
            rank=rank, broadcast=broadcast_object, export=export,
        )  # fmt: skip
    engine = EmbeddedEngine(
        student.hf_dir,
        stop_token_ids=tokens.stop_ids,
        vocab_size=tokens.common_vocab_size,
        dtype=dtype,
        device=platform.device(),
        max_batch_size=config.rollout.rollout_max_batch_size,
    )
    return EnginePool(engine, rank=rank, world_size=world_size, gather=gather_objects)
