"""Check and make the settings of a teacher on SGLang servers; nothing is started here."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_tropd.config import TrainConfig
from megatron_tropd.models.hf_config import load_hf_config
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.roles import num_nodes
from megatron_tropd.setup.engine_settings import reachable_host
from megatron_tropd.setup.model_specs import TeacherSpec
from megatron_tropd.setup.problems import Problems
from megatron_tropd.sglang.server_flags import TEACHER_FLAGS
from megatron_tropd.sglang.settings import ServerSettings, host_of, is_loopback, load_keys
from megatron_tropd.teacher.server.server import TeacherModel
from megatron_tropd.types import Needs

_OF_SERVERS = (
    "teacher_num_servers", "teacher_gpu_ids", "teacher_urls", "teacher_router_url", "teacher_sglang_tp_size",
)  # fmt: skip
_OF_MEGATRON = (
    "teacher_tensor_model_parallel_size", "teacher_pipeline_model_parallel_size", "teacher_expert_model_parallel_size",
    "teacher_expert_tensor_parallel_size", "teacher_offload",
)  # fmt: skip
_ELSEWHERE = "use --teacher-placement colocated or dedicated"


def check_teacher_placement(config: TrainConfig, needs: Needs, problems: Problems) -> None:
    """Check that the teacher's placement can give what the run needs; flags of other placements give a warning."""
    placement = f"--teacher-placement {config.teacher.teacher_placement}"
    on_servers = config.teacher.teacher_placement == "server"
    unused = [] if on_servers else [f"{TEACHER_FLAGS.prefix}{name}" for name in config.teacher_sglang_flags]
    cuts_reference = needs.reference_logprob and (
        config.reference.reference_hf_checkpoint or config.reference.reference_load
    )
    idle = _OF_SERVERS if not on_servers else () if cuts_reference else _OF_MEGATRON
    unused += [_flag(name) for name in idle if _is_set(config, name)]
    problems.warnings.extend(f"{placement} does not use {flag}" for flag in unused)
    if on_servers:
        _check_servers(config, needs, problems, placement)


def _check_servers(config: TrainConfig, needs: Needs, problems: Problems, placement: str) -> None:
    objective, logging = f"--objective {config.objective.objective}", config.logging
    problems.require(needs.teacher, f"{objective} has no teacher: leave out {placement}")
    problems.require(
        not needs.teacher_entropy,
        f"{objective} needs the teacher's entropy at every token, which SGLang does not give: {placement} does not "
        f"work with it, {_ELSEWHERE}",
    )
    problems.require(
        needs.divergence is None,
        f"{objective} compares with the teacher's full distribution, which SGLang does not give: {placement} does not "
        f"work with it, {_ELSEWHERE}",
    )
    problems.require(
        not needs.student_top_k,
        f"{objective} asks for log-probabilities at ids of each token's own, and SGLang takes one list of ids for a "
        f"whole text: {placement} does not work with it, {_ELSEWHERE}",
    )
    problems.require(
        not logging.gradient_diagnostics_interval,
        f"--gradient-diagnostics-interval {logging.gradient_diagnostics_interval} compares with the teacher's full "
        f"distribution, which SGLang does not give: leave it at 0 with {placement}, or {_ELSEWHERE}",
    )
    problems.require(
        not config.teacher.teacher_load,
        f"--teacher-load {config.teacher.teacher_load}: {placement} reads the weights of --teacher-hf-checkpoint only; "
        "give the HF directory (checkpoint_convert/megatron_to_hf.py makes it), or " + _ELSEWHERE,
    )
    given = [*config.teacher.teacher_urls, config.teacher.teacher_router_url]
    near = [url for url in given if is_loopback(host_of(url))]
    problems.require(
        num_nodes() == 1 or not near,
        f"--teacher-urls, --teacher-router-url: {' '.join(near)}: every rank of the job's {num_nodes()} machines asks "
        "there and reaches its own machine; give an address that all reach",
    )
    shared = sorted(set(config.teacher.teacher_urls) & set(config.engine.rollout_engine_urls))
    problems.require(
        not shared,
        f"--teacher-urls {' '.join(shared)}: the same servers are in --rollout-engine-urls, where the student's "
        "weights are pushed; give each its own",
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_set(config: TrainConfig, name: str) -> bool:
    return bool(getattr(config.teacher, name) != getattr(TrainConfig().teacher, name))


def teacher_server_settings(teacher: TeacherSpec, gpu_ids: tuple[int, ...]) -> ServerSettings:
    """Return the settings of a teacher's SGLang servers, which have the GPUs ``gpu_ids``; () leaves them to SGLang.

    Raises:
        ValueError: a setting cannot be used.
        OSError: the key file cannot be read.
    """
    config = teacher.config
    given, engine = config.teacher, config.engine
    return ServerSettings(
        names=TEACHER_FLAGS,
        hf_dir=teacher.model.hf_dir.absolute(),
        log_dir=Path(config.logging.run_dir).absolute() / teacher.role,
        dtype="bfloat16" if config.model.bf16 else "float32",
        python=Path(engine.sglang_python or sys.executable).absolute(),
        num_servers=given.teacher_num_servers,
        urls=tuple(given.teacher_urls),
        router_url=given.teacher_router_url,
        host=reachable_host(engine.sglang_host, num_nodes()),
        keys=load_keys(file=Path(engine.sglang_key_file) if engine.sglang_key_file else None),
        tp_size=given.teacher_sglang_tp_size,
        gpu_ids=gpu_ids,
        flags=tuple(word for name, words in config.teacher_sglang_flags.items() for word in (f"--{name}", *words)),
        cuda=platform.is_cuda(),
        start_timeout_s=engine.sglang_start_timeout,
        request_timeout_s=engine.sglang_request_timeout,
    )


def teacher_server_model(teacher: TeacherSpec, common_vocab_size: int) -> TeacherModel:
    """Return what a teacher's servers must hold."""
    config = teacher.config
    return TeacherModel(
        arch=teacher.model.arch,
        model_type=str(load_hf_config(teacher.model.hf_dir).get("model_type")),
        common_vocab_size=common_vocab_size,
        longest=config.data.max_prompt_length + config.data.max_response_length,
    )
