"""Functions of other projects, loaded from their installed packages.  A package that is not installed, or that does
not run on this device, is listed with the reason and is no error."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .contenders import Contender
from .inputs import Inputs

Loader = Callable[[], Callable[[Inputs], Tensor]]


def _module_from(package: str, path: str, stubs: dict[str, dict[str, Any]]) -> Any:
    """One file of an installed ``package``, with stand-ins for the imports that are not needed here: importing the
    whole of verl would need ray and more."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}")
    for name, attributes in stubs.items():
        stub = types.ModuleType(name)
        stub.__dict__.update(attributes, __path__=[])
        sys.modules.setdefault(name, stub)
    file = Path(found.submodule_search_locations[0]) / path
    name = "benchmark_peer_" + file.stem
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Triton looks for a kernel's source there
    spec.loader.exec_module(module)
    return module


def _verl_topk() -> Callable[[Inputs], Tensor]:
    nothing = {"preprocess_bshd_engine": None, "preprocess_thd_engine": None}
    config = {"DistillationConfig": object, "DistillationLossConfig": object}
    empty = ("verl", "verl.models", "verl.models.mcore", "verl.workers")
    stubs: dict[str, dict[str, Any]] = {name: {} for name in empty}
    stubs |= {"verl.models.mcore.util": nothing, "verl.workers.config": config}
    function = _module_from("verl", "trainer/distillation/megatron/losses.py", stubs)._VocabParallelKLDivergence

    def run(inputs: Inputs) -> Tensor:
        tokens = inputs.tokens
        logits = (inputs.hidden @ inputs.weight.t())[None]
        assert tokens.teacher_topk_logprob_TK is not None and tokens.teacher_topk_ids_TK is not None
        return function.apply(logits, tokens.teacher_topk_logprob_TK[None], tokens.teacher_topk_ids_TK[None], None)[
            0
        ].sum()

    return run


def _verl_triton() -> Callable[[Inputs], Tensor]:
    _need_cuda()
    device = {
        "get_device_capability": torch.cuda.get_device_capability,
        "get_device_name": lambda: "cuda",
        "is_cuda_available": True,
        "get_torch_device": lambda: torch.cuda,
    }
    stubs: dict[str, dict[str, Any]] = {"verl": {}, "verl.utils": {}, "verl.utils.device": device}
    kernels = _module_from("verl", "utils/kernel/kernels.py", stubs)

    class Function(torch.autograd.Function):
        """Stands in for verl's own wrapper, whose import would load the whole package."""

        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            """(log-probability, entropy) [N]."""
            reduction = kernels.get_entropy_reduction_enum_number("none")
            logprobs, entropy, *saved = kernels.efficient_entropy_forward(
                hidden, weight, labels, reduction, 1.0, dist.group.WORLD
            )
            ctx.save_for_backward(hidden, weight, labels, *saved)
            ctx.reduction = reduction
            return logprobs, entropy

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            """Gradients with respect to hidden states and weight."""
            hidden_grad, weight_grad = kernels.efficient_entropy_backward(
                *(g.contiguous() for g in grads), *ctx.saved_tensors, ctx.reduction, False, 1.0, dist.group.WORLD
            )
            return hidden_grad, weight_grad, None

    return lambda inputs: -Function.apply(inputs.hidden, inputs.weight, inputs.tokens.label_T)[0].sum()


def _liger_eager() -> Callable[[Inputs], Tensor]:
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")

    def run(inputs: Inputs) -> Tensor:
        nll, _ = module._apply_tp_fallback(
            inputs.hidden, inputs.weight, inputs.tokens.label_T, 1.0, -100, True, dist.group.WORLD
        )
        return nll.sum()

    return run


def _liger_triton() -> Callable[[Inputs], Tensor]:
    _need_cuda()
    module = importlib.import_module("liger_kernel.transformers")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda inputs: loss(inputs.weight, inputs.hidden, inputs.tokens.label_T)


def _cut_cross_entropy() -> Callable[[Inputs], Tensor]:
    _need_cuda()
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    # Without its gradient filter, which drops small probabilities.
    return lambda inputs: function(
        inputs.hidden, inputs.weight, inputs.tokens.label_T, reduction="sum", filter_eps=None
    )


def _torch_linear() -> Callable[[Inputs], Tensor]:
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise ModuleNotFoundError("this torch has no linear_cross_entropy")
    return lambda inputs: function(inputs.hidden, inputs.weight, inputs.tokens.label_T, reduction="sum")


def _need_cuda() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError("needs a GPU")


PEERS: dict[str, tuple[str, Loader]] = {
    "verl, Megatron top-k": ("top-k FKL", _verl_topk),
    "verl, Triton linear CE": ("NLL", _verl_triton),
    "Liger, eager TP fallback": ("NLL", _liger_eager),
    "Liger, Triton FLCE": ("NLL", _liger_triton),
    "cut-cross-entropy, exact": ("NLL", _cut_cross_entropy),
    "torch linear_cross_entropy": ("NLL", _torch_linear),
}


def load_peers() -> tuple[list[Contender], dict[str, str]]:
    """(contenders that were loaded, the reason for each one that was not)."""
    found, absent = [], {}
    for name, (loss, loader) in PEERS.items():
        try:
            found.append(Contender(name=name, loss=loss, run=loader(), whole_chunk="Megatron" in name))
        except Exception as error:  # foreign code may fail to load in any way; the table shows the reason
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, absent
