"""Settings of the frozen model that scores tokens, and of several such models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_tropd.config_fields import BY_ROLE, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """The frozen model that scores tokens.  Any other --teacher-sglang-X is passed to its SGLang servers as --X."""

    teacher_placement: Literal["colocated", "dedicated", "server", "file"] = setting(
        "colocated",
        "where the teacher is: on the student's ranks (colocated) or on the last ranks of the job (dedicated), in its "
        "own layout either way; on SGLang servers (server); file: its scores were made before by "
        "megatron_tropd.score_responses; docs/teachers.md",
    )
    teacher_scores: str = setting("", "directory of the scores of --teacher-placement file")
    teacher_world_size: int = setting(
        0, "ranks of a dedicated teacher, the job's last; the student has the others", group=BY_ROLE
    )
    teacher_hf_checkpoint: str = setting("", "HF directory of the teacher, or its name on the Hub")
    teacher_load: str = setting("", "Megatron checkpoint of the teacher instead of the HF weights")
    teacher_tensor_model_parallel_size: int = setting(1, "tensor-parallel ranks of the teacher")
    teacher_pipeline_model_parallel_size: int = setting(1, "pipeline stages of the teacher")
    teacher_decoder_first_pipeline_num_layers: int = setting(
        0, "layers of the teacher's first stage; 0 for an even split"
    )
    teacher_decoder_last_pipeline_num_layers: int = setting(
        0, "layers of the teacher's last stage; 0 for an even split"
    )
    teacher_expert_model_parallel_size: int = setting(1, "ranks over which the teacher's experts are spread")
    teacher_expert_tensor_parallel_size: int = setting(
        0, "ranks that share one expert of the teacher; 0 for --teacher-tensor-model-parallel-size"
    )
    teacher_offload: bool = setting(False, "keep teacher and reference in host memory between uses, to free a GPU's")
    teacher_num_servers: int = setting(
        1, "SGLang servers of the teacher to start on the machine of rank 0", group=BY_ROLE
    )
    teacher_gpu_ids: list[str] = setting(
        [], "GPUs of the teacher's servers, in order; default: the first that nothing else uses", group=BY_ROLE
    )
    teacher_urls: list[str] = setting([], "SGLang servers of the teacher that run already, instead of starting some")
    teacher_router_url: str = setting("", "sglang-router before the servers of --teacher-urls, which takes the scoring")
    teacher_sglang_tp_size: int = setting(1, "tensor-parallel ranks of each of the teacher's servers")
    teacher_config: list[str] = setting(
        [], "YAML files, each of which describes one of several teachers: for a domain of the prompts, or with a weight"
    )
    teacher_topk_margin: float = setting(
        -1.0,
        "nats by which engine and trainer may differ at a token that the gate is sure to accept, whose top-k the "
        "teacher then does not send; 0: send the top-k of all tokens; negative: 5 times --parity-limit",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTeacher:
    """One of several teachers, as a file of --teacher-config describes it."""

    name: str
    file: str
    domains: tuple[str, ...]
    """Of the prompts whose rollouts it scores; () for the domains that no other teacher names."""
    weight: float
    """Its share in the mixture of the teachers that score a prompt, before the shares are made to sum to 1."""
    settings: TeacherConfig
    sglang_flags: Mapping[str, tuple[str, ...]]

    @property
    def role(self) -> str:
        """What its ranks, its record and its directory are called."""
        return role_of(self.name)


def role_of(name: str) -> str:
    """Return the role of the teacher ``name``, one of several."""
    return f"teacher-{name}"
