"""Section f: a planned push between two processes on one GPU, through memory that both have open (CUDA IPC).

The receiver is the product's, in a process of its own, as a worker of SGLang's would be.  On a CPU the memory is a
memfd.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import uuid
from typing import Any

import torch

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.parallel.side_group import Backend, host_store
from megatron_tropd.weights.coordinates.engine_boxes import EngineLayout
from megatron_tropd.weights.coordinates.megatron_boxes import rank_boxes
from megatron_tropd.weights.plan.spec import PlanSpec
from megatron_tropd.weights.transport.connect import connect_sender

from .device import GB, wait
from .push_receiver import Invitation, Received, main
from .report import Report
from .setting import Setting
from .shapes import QWEN3_0_6B, QWEN3_1_7B, TINY
from .weights import fill

VERSIONS = 3
"""The first one warms up; the last one is compared."""
TIMEOUT_S = 40.0


def run(report: Report, setting: Setting) -> None:
    """See the module."""
    models = {"tiny": TINY} if setting.tiny else {"0.6B": QWEN3_0_6B, "1.7B": QWEN3_1_7B}
    for name, arch in models.items():
        with report.attempt(f"push of {name}"):
            _push(report, setting, name, arch)


def _push(report: Report, setting: Setting, name: str, arch: Architecture) -> None:
    # As the product: NCCL for payloads between GPUs, none of which go that way here, beside gloo for the frames.
    backend: Backend = "nccl" if setting.cuda else "gloo"
    spec = PlanSpec(
        arch=arch, layout=ParallelLayout(), engines=(EngineLayout(cpu=not setting.cuda),),
        dtype="bfloat16" if setting.cuda else "float32",
    )  # fmt: skip
    store = host_store(timeout_s=TIMEOUT_S)
    invitation = Invitation(
        spec=spec.to_json(), digest=spec.build().digest, port=store.port, group=f"push-{uuid.uuid4().hex}",
        device=str(platform.device()), backend=backend, versions=VERSIONS, timeout_s=TIMEOUT_S,
    )  # fmt: skip
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=main, args=(invitation, theirs), daemon=True)
    process.start()
    theirs.close()  # so that the end of the process is the end of the pipe
    try:
        sent = _send(spec, invitation, arch, store)
        received = _answer(ours)
    except Exception as error:
        raise RuntimeError(f"the receiver said: {_words(ours)}") from error  # its error may be the cause
    finally:
        process.join(5)
        process.kill()
    _report(report, setting, name, sent, received)


def _send(spec: PlanSpec, invitation: Invitation, arch: Architecture, store: Any) -> list[Any]:
    """Push every version, each with weights of its own; returns the sender's reports."""
    boxes = rank_boxes(arch, spec.layout, 0)
    dtype = getattr(torch, spec.dtype)
    params = {p.names[0]: torch.zeros(p.shape, dtype=dtype, device=platform.device()) for p in boxes}
    sender = connect_sender(
        spec, rank=0, params=params, store=store, group=invitation.group, backend=invitation.backend,
        timeout_s=TIMEOUT_S, shared=True,
    )  # fmt: skip
    reports = []
    for version in range(1, VERSIONS + 1):
        fill(params, boxes, arch, version=version)
        wait()
        reports.append(sender.push(version))
    return reports


def _words(pipe: Any) -> str:
    with contextlib.suppress(EOFError, OSError):
        if pipe.poll(1.0):
            return str(pipe.recv())
    return "nothing"


def _answer(pipe: Any) -> Received:
    if not pipe.poll(TIMEOUT_S):
        raise TimeoutError(f"no answer of the receiver within {TIMEOUT_S:g} s")
    answer = pipe.recv()
    if not isinstance(answer, Received):
        raise RuntimeError(str(answer))
    return answer


def _report(report: Report, setting: Setting, name: str, sent: list[Any], received: Received) -> None:
    way = "CUDA IPC" if setting.cuda else "shared memory"
    seconds = min(one.seconds for one in sent[1:])
    size = sent[-1].payload_bytes
    report.measured(
        f"push of {name} by {way}", seconds, form=".3f", unit=" s",
        reason=f"{size / GB:.3f} GB, {size / seconds / GB:.1f} GB/s; {sent[-1].staging_bytes / GB:.2f} GB of staging; "
        f"by version {', '.join(f'{one.seconds:.3f}' for one in sent)} s",
    )  # fmt: skip
    everything = received.payload_bytes == size and received.shared_bytes == size
    report.same(
        f"push of {name}: all bytes went through memory that both have open", everything,
        measured=f"{received.shared_bytes} of {size} bytes",
    )  # fmt: skip
    report.same(
        f"push of {name}: received weights", not received.differing,
        measured=f"{len(received.differing)} parameters differ", reason=", ".join(received.differing[:3]),
    )  # fmt: skip
