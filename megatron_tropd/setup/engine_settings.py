"""Make the settings of a run's SGLang servers from its flags; nothing is started here."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_tropd.config import TrainConfig
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.roles import meeting_host, num_nodes, own_address
from megatron_tropd.setup.model_specs import ModelSpec
from megatron_tropd.sglang.settings import SGLangSettings, is_loopback, load_keys
from megatron_tropd.weights.engine_loader import LOADER


def is_planned(config: TrainConfig) -> bool:
    """Return whether weights go directly from rank to rank; whole tensors are then sent only when that fails."""
    return config.engine.update_weight_transport in ("planned", "planned-shared")


def sglang_settings(config: TrainConfig, student: ModelSpec, gpu_ids: tuple[int, ...]) -> SGLangSettings:
    """Return the settings of this run's SGLang servers, which have the GPUs ``gpu_ids``; () leaves them to SGLang.

    Raises:
        ValueError: a setting cannot be used.
        OSError: the key file cannot be read.
    """
    engine = config.engine
    nodes = num_nodes() if engine.rollout_num_engines_per_node else 1
    return SGLangSettings(
        hf_dir=student.hf_dir.absolute(),
        log_dir=Path(config.logging.run_dir).absolute() / "engines",
        dtype="bfloat16" if config.model.bf16 else "float32",
        python=Path(engine.sglang_python or sys.executable).absolute(),
        num_servers=nodes * engine.rollout_num_engines_per_node or engine.rollout_num_engines,
        num_nodes=nodes,
        urls=tuple(engine.rollout_engine_urls),
        router_url=engine.rollout_router_url,
        host=reachable_host(engine.sglang_host, nodes),
        keys=load_keys(file=Path(engine.sglang_key_file) if engine.sglang_key_file else None),
        tp_size=engine.sglang_tp_size,
        gpu_ids=gpu_ids,
        release_memory=engine.rollout_release_memory,
        flags=tuple(word for name, words in config.sglang_flags.items() for word in (f"--{name}", *words)),
        weight_loader=LOADER if is_planned(config) else "",
        cuda=platform.is_cuda(),
        transport="auto" if is_planned(config) else engine.update_weight_transport,  # type: ignore[arg-type]
        bucket_bytes=engine.update_weight_buffer_size,
        start_timeout_s=engine.sglang_start_timeout,
        request_timeout_s=engine.sglang_request_timeout,
    )


def reachable_host(given: str, nodes: int) -> str:
    """Return the address of this machine's servers: on several machines one that the others reach."""
    return own_address(meeting_host()) if nodes > 1 and is_loopback(given) else given
