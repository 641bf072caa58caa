"""The row kernels and the exact top-k, on logits made directly; part of section a."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.ops import kernels, rows
from megatron_tropd.ops.shard import VocabShard
from megatron_tropd.ops.topk import exact_topk, local_topk, sort_keys, split_keys
from megatron_tropd.parallel import platform

from .report import Report
from .setting import Setting
from .shapes import VOCAB

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GRADIENT_LIMITS = {"fp32": 1e-5, "bf16": 4e-3, "fp16": 5e-4}
"""Relative error of a gradient's row; for 16 bits half a unit in the last place (2^-8, 2^-11) and a little."""
NATS = 1e-4
TOP_K = 64


def run(report: Report, setting: Setting) -> None:
    """Check the kernels (and the same functions in PyTorch) and the top-k."""
    generator = torch.Generator(device=platform.device()).manual_seed(3)
    shape = (33, 1003) if setting.tiny else (200, VOCAB)
    ways: dict[str, AbstractContextManager[object]] = {"PyTorch": patch.object(kernels, "use_triton", lambda _: False)}
    if kernels.use_triton(torch.ones(1, device=platform.device())):
        ways["Triton"] = nullcontext()
    else:
        report.not_run("Triton's kernels", "they need a GPU and Triton; tests/test_kernels.py interprets them")
    for way, switch in ways.items():
        for name, dtype in DTYPES.items():
            what = f"{way}, {name} [{shape[0]}, {shape[1]:,}]"
            with report.attempt(what), switch:
                _check_rows(report, what, name, _logits(shape, dtype, generator), generator)
        with report.attempt(f"{way}: special rows"), switch:
            _check_special(report, way)
    for name in ("fp32", "bf16"):
        with report.attempt(f"top-{TOP_K} in {name}"):
            _check_topk(report, name, _logits(shape, DTYPES[name], generator))
    with report.attempt("more than 2^31 logits"):
        _check_large(report, setting, generator)


def _logits(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator, device=generator.device)
    return values.mul_(3.0).to(dtype)


def _log_sum_and_entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return log sum exp and the entropy of every row, in float64."""
    log_p = logits.double().log_softmax(-1)
    return logits.double().logsumexp(-1), -(log_p.exp() * log_p).sum(-1)


def _nats(partials: tuple[Tensor, Tensor, Tensor], log_sum: Tensor, entropy: Tensor) -> float:
    """Return the largest error of log sum exp and entropy; NaN if any is."""
    maximum, total, moment = (part.double() for part in partials)
    found = torch.stack([maximum + total.log(), total.log() - moment / total])
    return float((found - torch.stack([log_sum, entropy])).abs().max())


def _gradient(logits: Tensor, scale: Tensor, slope: Tensor, offset: Tensor) -> Tensor:
    """Return e (scale - slope (z - m + offset)), e = exp(z - m), in float64."""
    shift = logits.double() - logits.double().amax(1, keepdim=True)
    return shift.exp() * (scale.double()[:, None] - slope.double()[:, None] * (shift + offset.double()[:, None]))


def _check_rows(report: Report, what: str, name: str, logits: Tensor, generator: torch.Generator) -> None:
    log_sum, entropy = _log_sum_and_entropy(logits)
    maximum, total, moment = rows.row_partials(logits)
    nats = _nats((maximum, total, moment), log_sum, entropy)
    report.limit(f"{what}: row statistics, nats", nats, NATS)
    scale, slope, offset = torch.randn(3, len(logits), generator=generator, device=logits.device)
    for title, given in (("", None), (" with entropy", slope)):
        expected = _gradient(logits, scale, torch.zeros_like(slope) if given is None else given, offset)
        ours = logits.clone()
        rows.softmax_gradient_(ours, maximum, scale, given, offset)
        error = float(((ours.double() - expected).norm(dim=1) / expected.norm(dim=1)).max())
        report.limit(f"{what}: gradient in place{title}, relative", error, GRADIENT_LIMITS[name])


def _check_special(report: Report, way: str) -> None:
    """Rows of -inf, rows with some -inf, NaN, +inf and one large value."""
    inf, nan = float("inf"), float("nan")
    given = [[-inf] * 5, [0.0, -inf, 1.0, -inf, -inf], [0.0, nan, 1.0, 2.0, 3.0], [3e4, -3e4, 0.0, 3e4, -inf]]
    logits = torch.tensor(given, device=platform.device()).repeat(1, 1001)
    maximum, total, moment = rows.row_partials(logits)
    first = bool(maximum[0] == -inf and total[0] == 0 and moment[0] == 0)
    finite = bool(torch.isfinite(torch.stack([maximum, total, moment])[:, [1, 3]]).all())
    report.same(
        f"{way}: a row of -inf has no mass, -inf is no NaN, NaN stays", first and finite and bool(total[2].isnan())
    )


def _check_topk(report: Report, name: str, logits: Tensor) -> None:
    """Ids and their order, among ties; the oracle is a stable sort, on parts of the rows."""
    rounded = (logits * 4).round() / 4  # in fp32 too there are then many equal logits
    count = min(TOP_K, rounded.shape[1])
    found = [part.double().sort(dim=1, descending=True, stable=True).indices[:, :count] for part in rounded.split(32)]
    expected = torch.cat(found)
    last = rounded.gather(1, expected[:, -1:])
    ties = int(((rounded == last).sum(1) > (rounded.gather(1, expected) == last).sum(1)).sum())
    shard = VocabShard(vocab_size=rounded.shape[1], rows_per_rank=rounded.shape[1], group=dist.group.WORLD)
    ids, values = exact_topk(rounded, count, shard)
    good = torch.equal(ids, expected) and torch.equal(values, rounded.gather(1, expected).float())
    report.same(f"top-{count} in {name}: ids and logits; {ties} of {len(rounded)} rows end in a tie", good and ties > 0)
    for shards in (2, 4):
        keys, start = [], 0
        for part in rounded.chunk(shards, 1):
            top, columns = local_topk(part.contiguous(), count)
            keys.append(sort_keys(top, columns + start))
            start += part.shape[1]
        ids, _ = split_keys(torch.cat(keys, 1).topk(count, dim=1).values)
        report.same(f"top-{count} in {name} of {shards} shards: ids", torch.equal(ids, expected))


def _check_large(report: Report, setting: Setting, generator: torch.Generator) -> None:
    """A block whose last rows begin beyond 2^31 elements: offsets that wrap would read and write elsewhere."""
    count, width = (40, 1003) if setting.tiny else (16384, VOCAB)
    logits = torch.empty(count, width, dtype=torch.bfloat16, device=platform.device())
    edge = min(2**31 // width, count - 3)  # the row in which element 2^31 lies
    checked = torch.tensor([0, edge, edge + 1, count - 1], device=logits.device)
    logits[checked] = _logits((len(checked), width), torch.bfloat16, generator)
    kept = logits[checked].clone()
    log_sum, entropy = _log_sum_and_entropy(kept)
    maximum, total, moment = (part[checked] for part in rows.row_partials(logits))
    nats = _nats((maximum, total, moment), log_sum, entropy)
    what = f"bf16 [{count:,}, {width:,}], {count * width / 2**31:.2f} x 2^31 logits"
    report.limit(f"{what}: row statistics of the rows around 2^31 and of the last one, nats", nats, NATS)
    numbers = torch.zeros(4, count, device=logits.device)
    numbers[0, checked], numbers[1:, checked] = maximum, torch.rand(3, len(checked), device=logits.device) + 0.5
    rows.softmax_gradient_(logits, *numbers)
    expected = _gradient(kept, *(part[checked] for part in numbers[1:]))
    error = float(((logits[checked].double() - expected).norm(dim=1) / expected.norm(dim=1)).max())
    report.limit(f"{what}: gradient in place of these rows, relative", error, GRADIENT_LIMITS["bf16"])
