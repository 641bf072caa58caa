"""Run on CUDA or, without it, on the CPU, with every supported Megatron-core.  Only this file and
checkpoint_writers.py, for saves, patch Megatron-core and know in what its versions differ.

Megatron-core calls ``torch.cuda`` and uses ``device="cuda"`` unconditionally.  On a machine without CUDA,
:func:`install` patches these calls (torch_without_cuda.py), so that the unmodified Megatron-core runs on the CPU over
gloo.  Call it before the first ``import megatron``.

Every name that is replaced is listed in ``REPLACED`` and has a test (tests/test_platform.py) that
fails when an upgrade of torch or megatron-core moves it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.parallel import checkpoint_writers, torch_without_cuda

REPLACED: dict[str, tuple[str, ...]] = {
    **torch_without_cuda.REPLACED,
    **checkpoint_writers.REPLACED,
    "megatron.core.tensor_parallel.random": ("_get_cuda_rng_state", "_set_cuda_rng_state"),
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer": (
        "_set_main_param_and_optimizer_states", "sharded_param_state_fully_reshardable",
    ),
    "megatron.core.transformer.torch_norm.WrappedTorchNorm": ("__new__",),
    "megatron.core.transformer.moe.token_dispatcher": ("maybe_move_tensor_to_cpu",),
}  # fmt: skip


def is_cuda() -> bool:
    """Return whether this process computes on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Return the device that this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if is_cuda() else torch_without_cuda.CPU


def backend() -> str:
    """Return the ``init_process_group`` backend: gloo for CPU tensors, NCCL for CUDA tensors."""
    return "cpu:gloo,cuda:nccl" if is_cuda() else "gloo"


def has_transformer_engine() -> bool:
    """Return whether Transformer Engine layers can be used (they need CUDA)."""
    return is_cuda() and _transformer_engine_is_installed()


@functools.cache
def _transformer_engine_is_installed() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def megatron_version() -> tuple[int, int]:
    """Return the version of the installed Megatron-core, such as (0, 19)."""
    from megatron.core.package_info import MAJOR, MINOR

    return MAJOR, MINOR


def adds_gradients_of_whole_experts() -> bool:
    """Return whether Megatron-core adds the gradients of experts that every tensor-parallel rank holds whole, without
    expert parallelism: 0.19 does, 0.16 takes them for gradients of dense layers."""
    return megatron_version() >= (0, 19)


def gradients_of_norm(optimizer: Any) -> list[Tensor]:
    """Return the gradients of which a Megatron optimizer takes the norm, each parameter's on one rank only."""
    newer = getattr(optimizer, "get_grads_for_grad_norm", None)  # named so since megatron-core 0.19
    return newer() if newer else optimizer.get_main_grads_for_grad_norm()  # type: ignore[no-any-return]


_installed = False


def install() -> None:
    """Patch torch and Megatron-core so that Megatron-core runs here.  Idempotent.

    With CUDA, torch is not patched.  Without Transformer Engine, Megatron's own layers and torch's AdamW are used, and
    three of their defects are fixed; everywhere the message of a failed save and the name in pickled tensors are.
    """
    global _installed
    if _installed:
        return
    _installed = True
    _leave_out_log_lines()
    if is_cuda():
        _patch_padding_of_buckets()
        checkpoint_writers.tell_errors()
        checkpoint_writers.put_errors_aside()
        _keep_the_name_in_pickles()
        if not has_transformer_engine():
            _patch_distributed_optimizer_load()
            _patch_norm_sequence_parallel()
            _name_the_missing_gemm()
        return
    # megatron-core's jit_fuser is torch.compile, bound when it is imported.  On a CPU compiling takes 12 s
    # and gains nothing at the sizes that run there.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    torch_without_cuda.install()
    _patch_megatron()


LEFT_OUT = {
    # fork() warns when the CPU generator has advanced; without CUDA that generator is the one in use.
    "megatron.core.tensor_parallel.random": "CPU RNG state changed",
    # A torch built for CUDA says when it is imported that there is no GPU.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    # As of megatron-core 0.19.  common.pt is written and read because 0.16 needs it (checkpoints/save.py).
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # Said at every save, synchronous ones too.  What replaces it is a package of its own, for GPUs.
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}
"""Logger -> what it would say in every run about this package's use of it, which no user can change."""


def _leave_out_log_lines() -> None:
    def keep(fragment: str) -> Any:
        return lambda record: fragment not in record.getMessage()

    for name, fragment in LEFT_OUT.items():
        logging.getLogger(name).addFilter(keep(fragment))


def _patch_megatron() -> None:
    _patch_rng()
    _patch_padding_of_buckets()
    _patch_distributed_optimizer_load()
    _patch_norm_sequence_parallel()
    checkpoint_writers.use_threads()
    checkpoint_writers.tell_errors()
    checkpoint_writers.put_errors_aside()
    _keep_the_name_in_pickles()
    _patch_expert_dispatch()
    _name_the_missing_gemm()


def _patch_rng() -> None:
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _patch_distributed_optimizer_load() -> None:
    """Let the distributed optimizer load states of torch's AdamW; megatron-core 0.16.1 cannot load their ``step``."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return

    def set_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        with torch.no_grad():
            for name, target in {"param": main_param, **self.optimizer.state[main_param]}.items():
                if name != "step":
                    target.copy_(tensors[name])

    distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def _patch_padding_of_buckets() -> None:
    """Save the optimizer's state of every parameter, and not its neighbours'.

    The distributed optimizer joins the state of all buckets without their padding, and then cuts the parameters out by
    positions that count the padding.  With --overlap-grad-reduce there are several buckets, and the checkpoint would
    hold wrong weights and moments, without an error.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer.sharded_param_state_fully_reshardable

    @functools.wraps(original)
    def state(self: Any, *args: Any, **kwargs: Any) -> Any:
        gather = self.get_parameter_state_dp_zero
        self.get_parameter_state_dp_zero = lambda *a, **k: _with_padding(self.buffers, gather(*a, **k))
        try:
            return original(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    DistributedOptimizer.sharded_param_state_fully_reshardable = state


def _with_padding(buffers: Any, state: Any) -> Any:
    """Return what ``get_parameter_state_dp_zero`` gave, with the padding behind every bucket of ``buffers``."""
    if state is None:
        return None
    for number, buffer in enumerate(buffers):
        for tensors in state[number].values():
            for name, joined in tensors.items():
                if not isinstance(joined, Tensor) or len(joined) != buffer.numel_unpadded:
                    continue
                padded = joined.new_zeros(buffer.numel)
                parts = joined.split([bucket.numel_unpadded for bucket in buffer.buckets])
                for bucket, part in zip(buffer.buckets, parts, strict=True):
                    padded[bucket.offset : bucket.offset + len(part)] = part
                tensors[name] = padded
    return state


def _patch_norm_sequence_parallel() -> None:
    """Let WrappedTorchNorm, which rejects sequence parallelism, be used with it.  Its weights are marked, as TE's norm
    does, so that ``finalize_model_grads`` adds their gradients over the tensor-parallel group."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original = WrappedTorchNorm.__new__

    def new(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return original(cls, config=config, hidden_size=hidden_size, eps=eps, **kwargs)
        config.sequence_parallel = False
        try:
            norm = original(cls, config=config, hidden_size=hidden_size, eps=eps, **kwargs)
        finally:
            config.sequence_parallel = True
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    WrappedTorchNorm.__new__ = new


def _keep_the_name_in_pickles() -> None:
    """Let pickled tensors name torch's function.  megatron-core 0.19 puts a stricter one of its own in its place, which
    a process without Megatron, such as an SGLang server, cannot import and refuses."""
    import megatron.core  # noqa: F401  (this import replaces it)

    stricter = torch.storage._load_from_bytes
    if stricter.__module__ == "torch.storage":
        return

    @functools.wraps(stricter)
    def load_from_bytes(data: Any) -> Any:
        return stricter(data)

    load_from_bytes.__module__, load_from_bytes.__qualname__ = "torch.storage", "_load_from_bytes"
    torch.storage._load_from_bytes = load_from_bytes


def _patch_expert_dispatch() -> None:
    """Convert the split sizes of an all-to-all to numpy here too: Megatron converts them only when it copies them from
    the GPU."""
    from megatron.core.transformer.moe import token_dispatcher

    original = token_dispatcher.maybe_move_tensor_to_cpu

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and isinstance(tensor, torch.Tensor):
            return tensor.numpy()
        return original(tensor, as_numpy, record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = move


def _name_the_missing_gemm() -> None:
    """Define ``te_general_gemm``: the router of megatron-core 0.16.1 tests whether it is None, but without TE does not
    define it."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # type: ignore[attr-defined]


def prime_adam_state(megatron_optimizer: Any) -> None:
    """Give a torch AdamW that has made no step its (zero) state, so that a checkpoint can be loaded into it, or made of
    it.  Needed for loading only without TE and apex, because Megatron itself does so for their Adam."""
    for adam in _torch_adams(megatron_optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def separate_adam_steps(megatron_optimizer: Any) -> None:
    """Give every parameter a step counter of its own after a load.

    megatron-core 0.16.1's distributed optimizer loads one shared tensor as the counter of all parameters of a
    torch AdamW.  Each parameter would then increment it, and the bias correction would be wrong from then on.
    """
    for adam in _torch_adams(megatron_optimizer):
        for state in adam.state.values():
            state["step"] = state["step"].clone()


def set_in_param_groups(optimizer_state: Any, settings: Mapping[str, Any]) -> None:
    """Set ``settings`` in every parameter group of a state that is about to be loaded, wherever in it the groups are.

    Before the load, because megatron-core 0.19 knows a group again by its learning rates, among other things, and
    refuses a checkpoint of a run that had others.
    """
    if not isinstance(optimizer_state, dict | list):
        return
    items = optimizer_state.items() if isinstance(optimizer_state, dict) else enumerate(optimizer_state)
    for key, value in items:
        if key == "param_groups":
            for group in value:
                group.update({name: setting for name, setting in settings.items() if name in group})
        else:
            set_in_param_groups(value, settings)


COMMON_FILE = "common.pt"
"""The part of a checkpoint's state that is not sharded, as megatron-core 0.16 writes and reads it; later versions read
it if it is there."""
COMMON_OBJECT = "common_state/"
"""Name, up to the number of the shard, of the object in which megatron-core 0.19 stores that part."""


def write_common_state(folder: Path, common: Any) -> None:
    """Write :data:`COMMON_FILE` into a checkpoint where this Megatron-core did not: every version is to load it."""
    if not (folder / COMMON_FILE).exists():
        checkpoint_writers.write_object(common, folder / COMMON_FILE)


def _torch_adams(megatron_optimizer: Any) -> list[torch.optim.Optimizer]:
    parts = getattr(megatron_optimizer, "chained_optimizers", [megatron_optimizer])
    return [part.optimizer for part in parts if isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW)]
