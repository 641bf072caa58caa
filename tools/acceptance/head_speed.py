"""Section b: the head's time and memory against other heads, and a profile of its chunks."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.parallel import platform
from tools.head_benchmark.contenders import NAIVE, OURS, Contender
from tools.head_benchmark.inputs import Inputs, Sizes, make_inputs
from tools.head_benchmark.measure import forward_backward, times, tried
from tools.head_benchmark.memory import peak_bytes
from tools.head_benchmark.peers import load_peers
from tools.planning.caches import head_bytes

from . import trace
from .device import one_rank
from .host_waits import first_wait, host_waits
from .report import Report
from .setting import Setting
from .shapes import VOCAB
from .table import Verdict

CHUNKS_PROFILED = 4
TIME_GOAL, PEAK_GOAL = 1.2, 0.05
TRAINING = "ours, one-pass, as in training"
_TOP_KERNELS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured."""

    tokens: tuple[int, ...]
    """The goal of speed is for the last."""
    hidden: tuple[int, ...]
    sizes: Sizes
    warmup: int
    repeats: int


_REAL_SIZES = Sizes(tokens=0, hidden=0, vocab=VOCAB, chunk=0, dtype=torch.bfloat16)
_TINY_SIZES = Sizes(tokens=0, hidden=0, vocab=503, chunk=0, top_k=8)
REAL = Plan(tokens=(8192, 32768), hidden=(2048, 4096), sizes=_REAL_SIZES, warmup=2, repeats=5)
TINY = Plan(tokens=(32, 64), hidden=(16,), sizes=_TINY_SIZES, warmup=0, repeats=1)


def chunk_of(hidden: int, tiny: bool) -> int:
    """Return the tokens of a chunk: four times the hidden size, as docs/performance.md advises."""
    return 16 if tiny else 4 * hidden


def into_main_grad(inputs: Inputs) -> Tensor:
    """Return the one-pass loss for a table whose gradient Megatron's DDP keeps, as it does in training."""
    weight: Any = inputs.weight
    if getattr(weight, "kept_main_grad", None) is None:
        weight.kept_main_grad = torch.zeros(weight.shape, device=weight.device)
    weight.main_grad, weight.grad_added_to_main_grad = weight.kept_main_grad, False
    return OURS[0].run(inputs)


def without_main_grad(contender: Contender) -> Contender:
    """Return the contender for a table that has no main_grad, whatever ran before it."""

    def run(inputs: Inputs) -> Tensor:
        weight: Any = inputs.weight
        weight.main_grad = None
        return contender.run(inputs)

    return replace(contender, run=run)


def run(report: Report, setting: Setting) -> None:
    """Measure our head first: another project's kernels may take long to compile."""
    one_rank()  # peers ask Megatron for its groups
    plan = TINY if setting.tiny else REAL
    found, absent = load_peers()
    for name, reason in absent.items():
        report.not_run(name, reason)
    peers = [without_main_grad(peer) for peer in found]
    training = Contender(name=TRAINING, loss="TrOPD", run=into_main_grad)
    ours = [*map(without_main_grad, OURS), training]
    _measure_all(report, setting, ours + [peer for peer in peers if "torch" in peer.name], plan)
    with report.attempt("profile of chunks"):
        _profile(report, setting, plan, training)
    # A plain log-softmax may need most of the GPU's memory, and then allocates anew in every turn.
    foreign = [without_main_grad(NAIVE), *(peer for peer in peers if "torch" not in peer.name)]
    _measure_all(report, setting, foreign, replace(plan, tokens=plan.tokens[-1:], warmup=1, repeats=3))


def _measure_all(report: Report, setting: Setting, contenders: Sequence[Contender], plan: Plan) -> None:
    for hidden in plan.hidden:
        for tokens in plan.tokens:
            sizes = replace(plan.sizes, tokens=tokens, hidden=hidden, chunk=chunk_of(hidden, setting.tiny))
            with report.attempt(f"{tokens:,} tokens, hidden {hidden}"):
                _measure(report, setting, contenders, sizes, plan)


def _peaks(report: Report, title: str, contenders: Sequence[Contender], sizes: Sizes) -> dict[str, int]:
    """Return the peak bytes of every contender that can run."""
    inputs, peaks = make_inputs(sizes, platform.device()), {}
    for contender in contenders:
        peak, why = tried(partial(_peak, contender, inputs))
        if peak is None:
            inputs.clear()
            verdict: Verdict = "failed" if contender.name.startswith("ours") else "not run"
            report.add(f"{title}: {contender.name}", verdict, reason=why)
        else:
            peaks[contender.name] = int(peak)
    return peaks


def _measure(report: Report, setting: Setting, contenders: Sequence[Contender], sizes: Sizes, plan: Plan) -> None:
    title = f"{sizes.tokens:,} tokens, hidden {sizes.hidden}, chunks of {sizes.chunk}"
    peaks = _peaks(report, title, contenders, sizes)
    able = [contender for contender in contenders if contender.name in peaks]
    products, medians = times(able, sizes, platform.device(), plan.repeats, plan.warmup)
    useful = 6 * sizes.tokens * sizes.hidden * sizes.vocab / products / 1e12
    report.measured(
        f"{title}: the three products, in turns with {len(able)} heads", products * 1e3, unit=" ms",
        reason=f"{useful:,.1f} TFLOP/s",
    )  # fmt: skip
    largest = sizes.tokens == plan.tokens[-1]
    for contender in able:
        seconds = medians[contender.name]
        if isinstance(seconds, str):
            report.not_run(f"{title}: {contender.name}", seconds)
            continue
        report.goal(
            f"{title}: {contender.name} ({contender.loss}), time / three products", seconds / products,
            at_most=TIME_GOAL, applies=contender.name == TRAINING and largest and setting.real,
            reason=f"{seconds * 1e3:,.1f} ms, {peaks[contender.name] / 1e6:,.1f} MB at the peak",
        )  # fmt: skip
    if TRAINING in peaks:
        counted = counted_bytes(sizes)
        report.goal(
            f"{title}: {TRAINING}, peak / count", peaks[TRAINING] / counted, at_most=1 + PEAK_GOAL,
            applies=setting.real, reason=f"count C v b + 4 v H + N H b = {counted / 1e6:,.1f} MB", form=".3f",
        )  # fmt: skip


def counted_bytes(sizes: Sizes) -> int:
    """Return the count of docs/performance.md for one-pass: the chunk, the weight gradient, the hidden gradient."""
    return head_bytes(
        tokens=sizes.tokens, chunk=sizes.chunk, columns=sizes.vocab, hidden=sizes.hidden,
        itemsize=sizes.dtype.itemsize, logits=sizes.dtype.itemsize, mode="one-pass",
    )  # fmt: skip


def _peak(contender: Contender, inputs: Inputs) -> int:
    """Return the most bytes beyond the inputs that one pass has at one time; what a first call keeps is not counted."""
    forward_backward(contender, inputs)
    inputs.clear()
    gc.collect()
    peak = peak_bytes(lambda: forward_backward(contender, inputs), inputs.hidden.device)
    inputs.clear()
    return peak


def _profile(report: Report, setting: Setting, plan: Plan, contender: Contender) -> None:
    """Profile one chunk and several: what a chunk adds is the difference."""
    hidden = plan.hidden[0]
    chunk = chunk_of(hidden, setting.tiny)
    traces, waits = {}, {}
    for count in (1, CHUNKS_PROFILED):
        sizes = replace(plan.sizes, tokens=count * chunk, hidden=hidden, chunk=chunk)
        work = partial(forward_backward, contender, make_inputs(sizes, platform.device()))
        for _ in range(2):  # compiles kernels, allocates
            work()
        traces[count] = trace.profiled(work, setting.directory / f"head_{count}_chunks.json.gz")
        waits[count] = host_waits(work)
    title = f"hidden {hidden}, chunks of {chunk}"
    more, once = waits[CHUNKS_PROFILED] - waits[1], waits[1]
    places = [f"{number} x {place}" for place, number in more.most_common()]
    report.goal(
        f"{title}: waits of the host for the GPU inside the chunk loop, per chunk",
        more.total() / (CHUNKS_PROFILED - 1), at_most=0.0, applies=setting.cuda, reason="; ".join(places),
        details=places,
    )  # fmt: skip
    report.measured(
        f"{title}: waits of the host in a pass of one chunk", once.total(), form=".0f",
        reason="; ".join(f"{number} x {place}" for place, number in once.most_common()),
    )  # fmt: skip
    place = first_wait(work)
    verdict: Verdict = "measured" if not setting.cuda else "miss" if place else "pass"
    report.add(
        f"{title}: under set_sync_debug_mode('error')", verdict, expected="goal: no wait" if setting.cuda else "",
        measured=f"waits at {place}" if place else "no wait",
    )  # fmt: skip
    if all(found.kernels for found in traces.values()):
        _report_traces(report, title, traces)
    else:
        why = "torch's profiler saw no kernels" if setting.cuda else "there are no kernels on a CPU"
        report.not_run(f"{title}: kernels and gaps of a chunk", why)


def _report_traces(report: Report, title: str, traces: dict[int, trace.Trace]) -> None:
    one, several = traces[1], traces[CHUNKS_PROFILED]
    report.measured(
        f"{title}, one chunk: kernels", sum(kernel.count for kernel in one.kernels), form=".0f",
        reason=f"{one.busy_us / 1e3:.2f} ms busy of {one.span_us / 1e3:.2f} ms; " + "; ".join(trace.lines(one, 6)),
        details=trace.lines(one, _TOP_KERNELS),
    )  # fmt: skip
    for count, found in traces.items():
        report.measured(
            f"{title}, {count} in the profile: gaps above {trace.GAP_US:.0f} us between kernels", len(found.gaps),
            form=".0f", reason=f"{sum(found.gaps) / 1e3:.2f} ms together; the profiler itself slows the host",
        )  # fmt: skip
    report.measured(
        f"{title}: calls in the profile that wait for the GPU, per chunk",
        (len(several.waits) - len(one.waits)) / (CHUNKS_PROFILED - 1),
        reason=f"{len(one.waits)} with one chunk, {len(several.waits)} with {CHUNKS_PROFILED}",
        details=several.waits,
    )  # fmt: skip
