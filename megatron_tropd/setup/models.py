"""Build the models of a run and load their weights."""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist

from megatron_tropd.checkpoints.load import load_checkpoint
from megatron_tropd.checkpoints.state import load_model_state
from megatron_tropd.config import TrainConfig
from megatron_tropd.models.build import HiddenStateGPT, build_gpt_model
from megatron_tropd.models.chunks import ModelChunks
from megatron_tropd.parallel.groups import ModelGroups, student_groups
from megatron_tropd.setup.model_specs import ModelSpec
from megatron_tropd.setup.run_spec import RunSpec
from megatron_tropd.teacher.megatron import MegatronTeacher
from megatron_tropd.training.student import Student, build_student, chunk_tokens, params_dtype
from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint
from megatron_tropd.weights.files.load import load_hf_into


def load_weights(
    model: HiddenStateGPT | ModelChunks, source: ModelSpec, groups: ModelGroups, config: TrainConfig
) -> None:
    """Fill ``model`` from its Megatron checkpoint or its HF files; collective over the world."""
    if source.megatron_dir is not None:
        wanted = {"model": model.sharded_state_dict(metadata={"dp_cp_group": groups.pg_collection.dp_cp})}
        state, _ = load_checkpoint(source.megatron_dir, None, wanted, arch=source.arch)
        load_model_state(model, state["model"])
        return
    load_hf_into(
        model,
        HfCheckpoint.open(source.hf_dir, source.arch),
        source.arch,
        groups.layout,
        dist.get_rank(),
    )


def make_student(spec: RunSpec) -> Student:
    """Build the student with its starting weights; collective over the world."""
    config = spec.config
    groups = student_groups(
        spec.models.student_layout, seed=config.training.seed, timeout_s=config.parallel.distributed_timeout_s
    )
    model = build_student(config, spec.models.student.arch, groups)
    load_weights(model, spec.models.student, groups, config)
    return Student(model, groups, config, vocab_size=spec.tokens.common_vocab_size)


def make_frozen(
    spec: RunSpec, source: ModelSpec, groups: ModelGroups, role: Literal["teacher", "reference"], *, offload: bool
) -> MegatronTeacher:
    """Build a frozen model that only scores tokens, in the layout of ``groups``; collective over the world.

    ``role`` says which flags messages name; with ``offload`` its weights are in host memory between uses.
    """
    config = spec.config
    model = build_gpt_model(
        source.arch,
        groups,
        params_dtype=params_dtype(config),
    )
    load_weights(model, source, groups, config)
    return MegatronTeacher(
        model,
        groups,
        vocab_size=spec.tokens.common_vocab_size,
        max_tokens_per_microbatch=config.training.max_tokens_per_microbatch,
        logits_chunk_tokens=chunk_tokens(config),
        offload=offload,
        role=role,
    )
