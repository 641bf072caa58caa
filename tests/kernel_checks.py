"""Run by test_kernels.py in a process of its own, because Triton reads TRITON_INTERPRET when a kernel is defined:

    python -m tests.kernel_checks interpret | compile

prints one JSON object: errors relative to float64, or sizes of the machine code.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_tropd.ops import kernels
from megatron_tropd.types import StepContext
from tests.dense import make_streams, tropd_losses

ROWS, WIDTH = 9, 5003


def _logits(dtype):
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(ROWS, WIDTH, generator=generator) * 4).to(dtype)
    logits[1] *= 20  # +-80 and more
    logits[2, ::3] = -torch.inf
    logits[3, 4000:] = logits[3, 0]  # ties, and a block that is constant
    return logits


def _relative(ours, expected):
    return float((ours.double() - expected).norm() / expected.norm())


def check_partials(dtype):
    """Worst error of (maximum, log of the sum, entropy); -inf alone and NaN must come out as defined."""
    module, logits = kernels.load(), _logits(dtype)
    maximum, total, moment = module.row_partials(logits)
    wide = logits.double()
    log_p = wide.log_softmax(1)
    entropy = -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(1)
    assert torch.equal(maximum.double(), wide.amax(1))
    odd = logits[:3].clone()
    odd[0] = -torch.inf
    odd[1, 17] = torch.nan
    odd[2, 17] = torch.inf
    found = module.row_partials(odd)
    assert found[0, 0] == -torch.inf and found[1, 0] == 0 and found[2, 0] == 0
    assert found[1, 1:].isnan().all() and found[2, 1:].isnan().all()
    return max(
        _relative(maximum.double() + total.double().log(), wide.logsumexp(1)),
        _relative(total.log() - moment / total, entropy),
    )


def check_gradient(dtype):
    """Worst error of the in-place gradient, with and without its entropy term, on a strided view."""
    module = kernels.load()
    maximum, scale, slope, offset = torch.randn(4, ROWS, generator=torch.Generator().manual_seed(3))
    worst = 0.0
    for part in (None, slope):
        storage = torch.full((ROWS, WIDTH + 13), 7.0, dtype=dtype)
        logits = storage[:, :WIDTH]
        logits.copy_(_logits(dtype))
        maximum = logits.float().amax(1)
        shift = logits.double() - maximum.double()[:, None]
        weight = scale.double()[:, None].expand_as(shift)
        if part is not None:
            weight = weight - part.double()[:, None] * (shift + offset.double()[:, None])
        expected = torch.where(shift == -torch.inf, 0.0, shift.exp() * weight)
        module.softmax_gradient_(logits, maximum, scale, part, offset)
        assert (storage[:, WIDTH:] == 7.0).all(), "wrote beyond the row"
        worst = max(worst, _relative(logits, expected))
    return worst


def check_topk(dtype):
    """Wrong ids of the exact top-k among many equal logits, in a strided view; 0 where all are right."""
    from megatron_tropd.ops.topk import local_topk

    generator = torch.Generator().manual_seed(5)
    storage = torch.randint(0, 40, (ROWS, WIDTH + 13), generator=generator).to(dtype)
    logits = storage[:, :WIDTH]
    logits[1] = 3.0  # all equal
    logits[2, :60] = torch.arange(60) + 100.0  # 60 of the 64 are clear
    logits[3] = torch.randperm(WIDTH, generator=generator) / 8.0  # few or no equals
    logits[4, 70:] = -torch.inf
    logits[5, :] = -0.0
    logits[5, 100:200] = 0.0
    _, columns = local_topk(logits, 64)
    expected = (-(logits.double() + 0.0)).sort(dim=1, stable=True).indices[:, :64]
    return float((columns.sort(1).values != expected.sort(1).values).sum())


def check_head(dtype):
    """The whole one-pass head on the kernels: worst error of loss, hidden and weight gradients."""
    from megatron_tropd.objectives.methods import ObjectiveSettings, make_objective
    from megatron_tropd.ops.one_pass import OnePass
    from megatron_tropd.ops.shard import VocabShard
    from megatron_tropd.ops.source import loss_rows, make_source

    tokens, vocab, size = 12, 1031, 16
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(tokens, size, generator=generator).to(dtype)
    weight = (torch.randn(vocab, size, generator=generator) / size**0.5).to(dtype)
    streams, _ = make_streams(num_tokens=tokens, vocab_size=vocab, top_k=64, seed=3, regions=[3, 2, 0] * 4)
    streams = replace(streams, label_T=torch.where(torch.arange(tokens) % 2 == 0, streams.teacher_topk_ids_TK[:, 5],
                                                   streams.label_T))  # fmt: skip
    shard = VocabShard(vocab_size=vocab, rows_per_rank=vocab, group=dist.group.WORLD, chunk_tokens=5)
    work = OnePass(
        source=make_source(hidden, weight, streams, shard, chunk_tokens=5, logits_dtype=None),
        objective=make_objective("tropd", ObjectiveSettings(top_k=64, guidance_beta=0.3)),
        tokens=streams, context=StepContext(), weight=weight, to_hidden=True, to_weight=True,
        drop_rows=True,
    )  # fmt: skip
    with torch.no_grad():
        totals, gradients, _ = work.run(loss_rows(streams))
    wide = [value.double().requires_grad_() for value in (hidden, weight)]
    losses = tropd_losses(wide[0] @ wide[1].t(), streams, beta=0.3)
    losses.sum().backward()
    return max(
        abs(float(totals.loss - losses.sum())) / float(losses.abs().sum()),
        _relative(gradients.hidden, wide[0].grad),
        _relative(gradients.weight, wide[1].grad),
    )


def interpret():
    """Errors under Triton's interpreter, by (check, dtype)."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert kernels.use_triton(torch.ones(1)), "the head would not take the kernels here"
    checks = {
        "row statistics": check_partials,
        "gradient in place": check_gradient,
        "top-k among equals": check_topk,
        "one-pass head": check_head,
    }
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return {f"{name}, {short}": check(dtype) for name, check in checks.items() for short, dtype in dtypes.items()}


def compile_for_gpu():
    """Bytes of machine code for an H100 (sm_90), which needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = kernels.load()
    rows = dict.fromkeys(("maxima", "scales", "slopes", "offsets", "out"), "*fp32")
    rows |= {"columns": "*i64", "aboves": "*i64"}
    constants = dict.fromkeys(("BLOCK", "HAS_SLOPE", "K"), "constexpr")
    sizes = {"stride": "i64", "num_rows": "i32", "width": "i32", **constants}
    kernels_of = (
        (module._partials_kernel, {}), (module._gradient_kernel, {"HAS_SLOPE": True}), (module._equals_kernel, {"K": 64}),
    )  # fmt: skip
    compiled = {}
    for dtype in ("bf16", "fp32"):
        for kernel, constants in kernels_of:
            types = {**rows, **sizes, "logits": f"*{dtype}", "lasts": f"*{dtype}"}
            signature = {name: types[name] for name in kernel.arg_names}
            source = ASTSource(kernel, signature=signature, constexprs={"BLOCK": 4096, **constants})
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
            compiled[f"{kernel.__name__} {dtype}"] = len(made.asm["cubin"])
    return compiled


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_for_gpu}[sys.argv[1]]()))
