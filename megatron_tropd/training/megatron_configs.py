"""Megatron's three configs of the student: what this package sets, and what flags of Megatron's own add to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel import layers

from megatron_tropd.config import TrainConfig
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.models.attention import ATTENTION_DTYPES
from megatron_tropd.models.build import transformer_config
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.parallel.megatron_flags import Home, megatron_fields, values_of


def params_dtype(config: TrainConfig) -> torch.dtype:
    """Return the dtype of the weights; the optimizer's master weights are fp32 either way."""
    return torch.bfloat16 if config.model.bf16 else torch.float32


def model_overrides(config: TrainConfig, layout: ParallelLayout) -> dict[str, Any]:
    """Return the fields of the student's TransformerConfig that do not come from its architecture and layout."""
    overrides: dict[str, Any] = {
        "sequence_parallel": config.parallel.sequence_parallel and layout.tp > 1,
        # Read by DDP when it is built: without it, gradients are divided by DP a second time.
        "calculate_per_token_loss": True,
        "deterministic_mode": config.model.deterministic_mode,
    }
    # Megatron's default sends a batch of messages at one time; between two stages that are each other's next and
    # previous one, the interleaved schedule would take them for one another.
    overlap = config.megatron_flags.get("overlap-p2p-comm", layout.chunks > 1)
    overrides.update(overlap_p2p_comm=overlap, batch_p2p_comm=not overlap)
    if config.model.recompute_granularity != "none":
        overrides["recompute_granularity"] = config.model.recompute_granularity
    if config.model.recompute_granularity == "full":
        overrides.update(recompute_method="uniform", recompute_num_layers=1)
    return {**overrides, **values_of(config.megatron_flags, "model")}


def ddp_config(config: TrainConfig) -> DistributedDataParallelConfig:
    """Return the config of the student's gradient buffers."""
    values = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": config.parallel.use_distributed_optimizer,
        **values_of(config.megatron_flags, "ddp"),
    }
    return DistributedDataParallelConfig(**values)


def optimizer_config(config: TrainConfig) -> OptimizerConfig:
    """Return the config of the student's optimizer."""
    training = config.training
    values = {
        "optimizer": "adam", "lr": training.lr, "min_lr": training.min_lr, "weight_decay": training.weight_decay,
        "adam_beta1": training.adam_beta1, "adam_beta2": training.adam_beta2, "adam_eps": training.adam_eps,
        "clip_grad": training.clip_grad, "bf16": config.model.bf16, "params_dtype": params_dtype(config),
        "use_distributed_optimizer": config.parallel.use_distributed_optimizer,
        **values_of(config.megatron_flags, "optimizer"),
    }  # fmt: skip
    return OptimizerConfig(**values)


def megatron_errors(config: TrainConfig, arch: Architecture, layout: ParallelLayout) -> list[str]:
    """Return why Megatron-core would refuse the student's settings; empty when it would not.  Nothing is built."""
    errors = combination_errors(config, layout)
    dtype, overrides = params_dtype(config), model_overrides(config, layout)
    makers: dict[Home, Callable[[], Any]] = {
        "model": lambda: transformer_config(arch, layout, dtype, overrides),
        "ddp": lambda: ddp_config(config),
        "optimizer": lambda: optimizer_config(config),
    }
    for home, make in makers.items():
        try:
            make()
        except (ValueError, AssertionError, RuntimeError, ImportError, TypeError) as error:
            fields = megatron_fields()
            given = ", ".join(f"--{flag}" for flag in config.megatron_flags if home in fields[flag].homes)
            reason = " ".join(str(error).split()) or type(error).__name__
            errors.append(f"Megatron-core refuses {given or 'the settings of the student'}: {reason}")
    return errors


def combination_errors(config: TrainConfig, layout: ParallelLayout) -> list[str]:
    """Return what is missing for Megatron's own flags; Megatron would ignore them, or fail when the model is built."""
    given, parallel = config.megatron_flags, config.parallel
    needs: list[tuple[str, str, bool]] = [
        ("overlap-param-gather", "--use-distributed-optimizer", parallel.use_distributed_optimizer),
        ("overlap-param-gather", "--overlap-grad-reduce", bool(given.get("overlap-grad-reduce"))),
        ("align-param-gather", "--overlap-param-gather", bool(given.get("overlap-param-gather"))),
        ("overlap-p2p-comm", "--no-batch-p2p-comm", not given.get("batch-p2p-comm")),
        ("batch-p2p-comm", "--no-overlap-p2p-comm with virtual pipeline stages",
         layout.chunks == 1 or given.get("overlap-p2p-comm") is False),
        ("tp-comm-overlap", "--sequence-parallel", parallel.sequence_parallel),
        ("tp-comm-overlap", "--tensor-model-parallel-size above 1", layout.tp > 1),
        ("tp-comm-overlap", "Transformer Engine, which is not installed or has no GPU",
         platform.has_transformer_engine()),
        ("gradient-accumulation-fusion", "apex's extension fused_weight_gradient_mlp_cuda, which "
         "is not installed", getattr(layers, "_grad_accum_fusion_available", True)),
    ]  # fmt: skip
    errors = [f"--{flag} needs {what}" for flag, what, there in needs if given.get(flag) and not there]
    te_attention = platform.has_transformer_engine() and params_dtype(config) in ATTENTION_DTYPES
    if layout.cp > 1 and platform.is_cuda() and not te_attention:
        errors.append(
            f"--context-parallel-size {layout.cp} needs Transformer Engine's attention on a GPU: install Transformer "
            "Engine and give --bf16"
        )
    if layout.chunks > 1 and layout.pp == 2 and given.get("overlap-p2p-comm") is False:
        errors.append("--no-overlap-p2p-comm with virtual stages needs --pipeline-model-parallel-size above 2")
    return errors
