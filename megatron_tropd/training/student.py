"""The student: GPTModel, Megatron's DDP, optimizer and learning-rate schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_tropd.checkpoints.state import load_model_state
from megatron_tropd.config import TrainConfig, TrainingConfig
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.models.build import HiddenStateGPT
from megatron_tropd.models.chunks import ModelChunks, build_chunks
from megatron_tropd.ops.vocab_parallel import HeadSettings, VocabShard
from megatron_tropd.parallel import context, optimizer_memory, platform, user_buffers
from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.parallel.host_offload import HostBlocks, HostOffload
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.parallel.optimizer_parts import in_parts_of
from megatron_tropd.training.data_parallel import wrap
from megatron_tropd.training.megatron_configs import ddp_config, model_overrides, optimizer_config, params_dtype
from megatron_tropd.types import Needs

SHARDED_STATE_METADATA = {
    # A distributed optimizer saved this way loads into any TP x PP x DP.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}

Gradient = list[list[Tensor]]
"""Gradient tensors (fp32) of each optimizer, this rank's part."""
_SLICE = 1 << 24
"""Elements of a gradient that are converted to fp64 at one time."""
_SET_BY_FLAGS = ("max_lr", "min_lr", "betas", "eps")
"""Settings of all parameter groups that come from flags, not from a checkpoint; ``lr`` and ``weight_decay`` are set by
the schedule, from its own flags."""


def chunk_tokens(config: TrainConfig) -> int:
    """Return the number of tokens whose logits exist at one time.

    Every chunk reads and writes the fp32 gradient of the output table once; on a GPU small chunks would cost more
    than their products (docs/performance.md).
    """
    return config.training.logits_chunk_tokens or (8192 if platform.is_cuda() else 1024)


def token_multiple(config: TrainConfig, layout: ParallelLayout) -> int:
    """Return the number of which the packed tokens of a micro-batch are a multiple.

    Context and sequence parallelism split them over CP and TP.  The buffers of --tp-comm-overlap have one size, so with
    it every micro-batch has as many tokens as the longest may have.
    """
    multiple = context.token_multiple(layout.cp, layout.tp)
    if not config.megatron_flags.get("tp-comm-overlap"):
        return multiple
    return -(-config.training.max_tokens_per_microbatch // multiple) * multiple


def training_errors(arch: Architecture, layout: ParallelLayout, *, sequence_parallel: bool) -> list[str]:
    """Return why megatron-core cannot train this model in this layout, though it can run it; empty when it can."""
    errors = []
    if arch.num_experts and layout.tp > 1 and not sequence_parallel:
        errors.append(
            f"a model with experts trains at --tensor-model-parallel-size {layout.tp} only with --sequence-parallel"
        )
    whole_experts = arch.num_experts and layout.ep == 1 and layout.expert_tp != layout.tp
    if whole_experts and not platform.adds_gradients_of_whole_experts():
        errors.append(
            f"--expert-tensor-parallel-size {layout.expert_tp} other than --tensor-model-parallel-size {layout.tp} "
            "trains only with --expert-model-parallel-size above 1, or with megatron-core 0.19: this one would lose "
            "gradients"
        )
    return errors


def build_student(config: TrainConfig, arch: Architecture, groups: ModelGroups) -> ModelChunks:
    """Build this rank's part of the student, without loading its weights.

    Raises:
        ValueError: the student cannot be trained in this layout; the message names the flags.
    """
    if errors := training_errors(arch, groups.layout, sequence_parallel=config.parallel.sequence_parallel):
        raise ValueError("; ".join(errors))
    overrides = model_overrides(config, groups.layout)
    if overrides.get("tp_comm_overlap"):
        user_buffers.initialize(
            tokens=token_multiple(config, groups.layout) // groups.layout.cp, hidden_size=arch.hidden_size,
            tp=groups.layout.tp, backend=overrides.get("tp_comm_bootstrap_backend", "nccl"),
        )  # fmt: skip
    return build_chunks(arch, groups, params_dtype=params_dtype(config), config_overrides=overrides)


class Student:
    """The student model with its optimizer and schedule."""

    def __init__(self, model: ModelChunks, groups: ModelGroups, config: TrainConfig, *, vocab_size: int) -> None:
        self.model = model
        self.groups = groups
        self._stale = False
        self.version = 0
        """Number of updates made; identifies the weights that the engines sample from."""
        self.microbatches = 0
        """Number of training forward passes begun on this rank; shows a heartbeat that work goes on."""
        self.shard = VocabShard(
            vocab_size=vocab_size,
            rows_per_rank=model.vocab_size // groups.layout.tp,
            group=groups.pg_collection.tp,
            chunk_tokens=chunk_tokens(config),
        )
        self._head = HeadSettings(
            mode=config.training.head_mode,
            logits_dtype=torch.float32 if config.training.logits_dtype == "fp32" else None,
            topk_overlap=config.logging.log_topk_overlap,
        )
        self.token_multiple = token_multiple(config, groups.layout)
        """Packed tokens of a micro-batch are a multiple of it."""
        self.sequence_multiple = context.sequence_multiple(groups.layout.cp)
        """So are the tokens of every sequence of this, padding included."""
        self.microbatch_multiple = (model.config.microbatch_group_size_per_vp_stage or 1) if groups.layout.vpp else 1
        """Megatron's interleaved schedule takes micro-batches in groups of this many."""
        self.ddp = wrap(model, ddp_config(config))
        """Megatron's DDP around each model chunk."""
        self.optimizer = get_megatron_optimizer(optimizer_config(config), self.ddp)
        self.scheduler = _scheduler(self.optimizer, config.training, config.num_updates)
        self._offloads = config.parallel.rl_offload_optimizer_during_inference
        self._host_blocks = HostBlocks(pin=platform.is_cuda())
        self._asleep: HostOffload | None = None
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = self.optimizer.scale_loss

    def close(self) -> None:
        """End training, so that the memory of the weights can be freed."""
        break_cycles(self.model)

    def sleep(self) -> None:
        """Move optimizer state to host memory and free the gradients, until :meth:`wake`; the weights stay, so the
        student can score and be exported.  Nothing happens without --rl-offload-optimizer-during-inference."""
        if not self._offloads or self._asleep is not None:
            return
        self.optimizer.zero_grad()  # fp32 copies of gradients, which the optimizer makes anew
        for chunk in self.ddp:
            optimizer_memory.free_gradient_buffers(chunk)
        # Not Megatron's offload_to_cpu: it goes through pageable memory, and in fp32 takes the weights away too.
        self._asleep = HostOffload(optimizer_memory.state_tensors(self.optimizer), blocks=self._host_blocks)

    def wake(self) -> None:
        """Bring back what :meth:`sleep` moved; the gradients are zero.  Nothing happens where it moved nothing."""
        if self._asleep is not None:
            self._asleep.prefetch()
            for chunk in self.ddp:  # beside the copies
                optimizer_memory.restore_gradient_buffers(chunk)
            self._asleep.wait()
            self._asleep = None

    def head(self, needs: Needs) -> HeadSettings:
        """Return the settings of the vocabulary head for an objective's ``needs``."""
        return replace(self._head, topk_overlap=self._head.topk_overlap and needs.top_k > 0)

    def zero_grad(self) -> None:
        """Set all gradients to zero."""
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def head_weight(self) -> Tensor:
        """Return this rank's rows of the output table, for a pass that runs now: no module reads it whose hook would
        wait for its gather under --overlap-param-gather."""
        weight = self.model.lm_head_weight()
        if self._gathers_late:
            self.ddp[-1].param_to_bucket_group[weight].finish_param_sync(
                skip_next_bucket_dispatch=self.ddp[-1].ddp_config.align_param_gather
            )
        return weight

    def gather_weights(self) -> None:
        """Gather the weights that --overlap-param-gather leaves to the next pass, before anything else reads them.
        Collective over the ranks of a replica group; does nothing where the weights are whole."""
        if self._gathers_late and self._stale:
            for chunk in self.ddp:
                chunk.start_param_sync(force_sync=True)
        self._stale = False

    def grad_norm(self) -> float:
        """Return the global norm of the finished gradients, before clipping; the same number on every rank."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def gradient(self) -> Gradient:
        """Return this rank's part of the finished gradient, valid until the next pass.

        Over all ranks every parameter occurs exactly once: tied and replicated parameters are left out on all ranks
        but one.
        """
        self.optimizer.prepare_grads()
        return [platform.gradients_of_norm(optimizer) for optimizer in self._optimizers]

    def inner_product(self, left: Gradient, right: Gradient) -> float:
        """Return the inner product of two gradients over all parameters; the same number on every rank.  Collective
        over the ranks that share a gradient."""
        total = 0.0
        for optimizer, mine, other in zip(self._optimizers, left, right, strict=True):
            part = torch.zeros((), dtype=torch.float64, device=platform.device())
            for a, b in zip(mine, other, strict=True):
                for x, y in zip(a.flatten().split(_SLICE), b.flatten().split(_SLICE), strict=True):
                    part += (x.double() * y.double()).sum()
            torch.distributed.all_reduce(part, group=optimizer.get_grad_stats_parallel_group())
            total += float(part)
        return total

    @property
    def _gathers_late(self) -> bool:
        return bool(self.ddp[0].use_forward_hook)

    @property
    def _optimizers(self) -> list[Any]:
        """The optimizers inside Megatron's: one per set of parameters with its own ranks, so experts have their own."""
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])

    @property
    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        """Clip the gradient, update the weights, and advance the schedule and the version."""
        self.optimizer.step()
        self._stale = True
        self.scheduler.step(increment=1)
        self.version += 1

    def skip(self) -> None:
        """Skip an update but advance the schedule, so that the learning rate of the n-th update does not change."""
        self.scheduler.step(increment=1)

    def sharded_state_dict(self, *, is_loading: bool = False, with_optimizer: bool = True) -> dict[str, Any]:
        """Return the sharded state of model, optimizer and schedule for ``dist_checkpointing``."""
        self.gather_weights()
        if with_optimizer:  # before the first update too, of whose rollouts a checkpoint may be made
            platform.prime_adam_state(self.optimizer)
        metadata = {**SHARDED_STATE_METADATA, "dp_cp_group": self.groups.pg_collection.dp_cp}
        model_state = self.model.sharded_state_dict(metadata=metadata)
        state: dict[str, Any] = {"model": model_state}
        if with_optimizer:
            state["optimizer"] = self.optimizer.sharded_state_dict(model_state, is_loading, metadata=metadata)
            state["opt_param_scheduler"] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any], *, version: int) -> None:
        """Continue from a loaded :meth:`sharded_state_dict`.  Settings that have flags (learning rate, betas, length
        of the decay) are those of this launch, not those of the checkpoint."""
        load_model_state(self.model, state["model"])
        if version:
            groups = [optimizer.param_groups for optimizer in self._optimizers]
            state = {**state, "optimizer": in_parts_of(groups, state["optimizer"])}
            platform.set_in_param_groups(
                state["optimizer"], {name: self.optimizer.param_groups[0][name] for name in _SET_BY_FLAGS}
            )
            self.optimizer.load_state_dict(state["optimizer"])
        else:  # before the first update the optimizer knows only the weights, and Megatron stores no count of 0 updates
            self.optimizer.reload_model_params()
        platform.separate_adam_steps(self.optimizer)  # also before the first update: the state was primed to be read
        self.scheduler.load_state_dict(state["opt_param_scheduler"])
        self.version = version


def break_cycles(model: ModelChunks | HiddenStateGPT) -> None:
    """Break the reference cycles that would keep a trained model and its process groups until the process ends.

    Two cycles lead through autograd's nodes to DDP's gradient hooks, where Python's garbage collector cannot see them:
    from the config through the optimizer's fp32 shards, and from the probabilities that an expert dispatcher keeps.
    """
    config = model.config
    config.grad_scale_func = config.no_sync_func = config.grad_sync_func = config.param_sync_func = None
    for module in model.modules():
        if dispatcher := getattr(module, "token_dispatcher", None):
            dispatcher.probs = None


def _scheduler(optimizer: Any, training: TrainingConfig, num_updates: int) -> OptimizerParamScheduler:
    """Make the schedule of learning rate and weight decay; it counts updates, not samples as Megatron-LM does."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=training.lr if training.lr_decay_style == "constant" else training.min_lr,
        lr_warmup_steps=training.lr_warmup_iters,
        lr_decay_steps=max(num_updates, training.lr_warmup_iters + 1),
        lr_decay_style=training.lr_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=num_updates,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
