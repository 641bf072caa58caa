"""Check the engines' settings against each other and against the student; nothing is started."""

from __future__ import annotations

import dataclasses

from megatron_tropd.config import EngineConfig, TrainConfig
from megatron_tropd.parallel import platform
from megatron_tropd.setup.engine_settings import is_planned
from megatron_tropd.setup.model_specs import Models
from megatron_tropd.setup.problems import Problems
from megatron_tropd.sglang.settings import host_of, is_loopback
from megatron_tropd.weights.coordinates.engine_boxes import EngineLayout
from megatron_tropd.weights.engine_loader import LOADER
from megatron_tropd.weights.plan.spec import PlanSpec

_EP_FLAGS = ("ep-size", "ep", "expert-parallel-size")
_OF_BOTH_ENGINES = frozenset({"rollout_engine", "parity_limit", "on_parity"})
_OF_TEACHER_SERVERS = frozenset(
    {"sglang_python", "sglang_host", "sglang_key_file", "sglang_start_timeout", "sglang_request_timeout"}
)


def check_engine_flags(config: TrainConfig, problems: Problems) -> None:
    """Check the servers' timeouts together; settings that the chosen engine does not use give a warning."""
    engine = config.engine
    teacher_on_servers = any(own.teacher.teacher_placement == "server" for own in config.by_teacher.values())
    start, request = engine.sglang_start_timeout, engine.sglang_request_timeout
    if engine.rollout_engine == "sglang":
        problems.require(
            not (engine.rollout_release_memory and config.rollout.rollout_lag),
            "--rollout-release-memory frees the engines' memory while the trainer trains, and with --rollout-lag 1 "
            "they write then: leave out one",
        )
        problems.require(
            not (engine.rollout_gpu_ids and engine.rollout_num_gpus_per_node),
            "--rollout-gpu-ids and --rollout-num-gpus-per-node both choose the servers' GPUs: leave out one",
        )
    if engine.rollout_engine == "sglang" or teacher_on_servers:
        minutes = config.parallel.distributed_timeout_minutes
        problems.require(
            minutes * 60 > start + request,
            f"--distributed-timeout-minutes {minutes:g} ({minutes * 60:g} s) must exceed --sglang-start-timeout "
            f"{start:g} s + --sglang-request-timeout {request:g} s = {start + request:g} s: the other ranks wait in a "
            "collective while a server is started anew",
        )
    if engine.rollout_engine == "sglang":
        return
    used = _OF_BOTH_ENGINES | (_OF_TEACHER_SERVERS if teacher_on_servers else frozenset())
    changed = [
        "--" + f.name.replace("_", "-")
        for f in dataclasses.fields(EngineConfig)
        if f.name not in used and getattr(engine, f.name) != getattr(EngineConfig(), f.name)
    ]
    unused = [*changed, *(f"--sglang-{name}" for name in config.sglang_flags)]
    problems.warnings.extend(f"--rollout-engine {engine.rollout_engine} does not use {flag}" for flag in unused)


def check_engine_layout(config: TrainConfig, models: Models, problems: Problems) -> None:
    """Check that SGLang can run the student, and that a planned transport suits the servers and can reach them."""
    if config.engine.rollout_engine != "sglang":
        return
    arch = models.student.arch
    errors = EngineLayout().cut_errors(arch)  # with TP 1 and EP 1: models that SGLang cannot run in any layout
    problems.errors.extend(f"{error}; use --rollout-engine embedded" for error in errors)
    if is_planned(config) and not errors:
        _check_planned(config, models, problems)


def _check_planned(config: TrainConfig, models: Models, problems: Problems) -> None:
    engine = config.engine
    flag = f"--update-weight-transport {engine.update_weight_transport}"
    if urls := engine.rollout_engine_urls:
        far = [url for url in urls if not is_loopback(host_of(url))]
        problems.require(
            not far,
            f"{flag} reaches servers of this host only, not {', '.join(far)} of --rollout-engine-urls: choose bytes",
        )
        problems.warnings.append(
            f"{flag}: the servers of --rollout-engine-urls must run with --custom-weight-loader {LOADER}"
        )
        return  # the layout of servers that run already is not set by flags of this run
    ep_sizes = [words[0] for name in _EP_FLAGS if (words := config.sglang_flags.get(name))]
    if ep_sizes and not ep_sizes[0].isdecimal():
        problems.errors.append(f"--sglang-ep-size {ep_sizes[0]} is not a number of ranks")
        return
    layout = EngineLayout(tp=engine.sglang_tp_size, ep=int(ep_sizes[0]) if ep_sizes else 1, cpu=not platform.is_cuda())
    spec = PlanSpec(
        arch=models.student.arch, layout=models.student_layout, engines=(layout,),
        dtype="bfloat16" if config.model.bf16 else "float32", bucket_bytes=engine.update_weight_buffer_size,
    )  # fmt: skip
    try:
        spec.build()
    except ValueError as error:
        problems.errors.append(f"{flag}, --update-weight-buffer-size {engine.update_weight_buffer_size}: {error}")
