"""Processes for the planned transport: torch only (Megatron costs seconds a process), one side group per update run."""

from __future__ import annotations

import faulthandler
import gc
import os
from contextlib import nullcontext
from multiprocessing.connection import Connection
from unittest.mock import patch

import numpy as np

from tests.ranks import answer_calls
from tests.weight_cases import Case

BITS = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
POISON = {"bfloat16": 0x7FC1, "float16": 0x7E01, "float32": 0x7FC00001}  # NaNs


def serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    """A process without a default process group."""
    faulthandler.enable()
    os.environ.update(RANK=str(rank), OMP_NUM_THREADS="1")
    import torch

    torch.set_num_threads(1)
    answer_calls(pipe)


def hf_bits(case: Case, version: int, dtype: str) -> dict[str, np.ndarray]:
    """Random bit patterns for every HF tensor, NaN payloads among them; others for every version."""
    from megatron_tropd.weights.coordinates.hf_shapes import hf_shapes

    draw = np.random.default_rng(version)
    kind = BITS[dtype]
    tensors = {}
    for name, shape in hf_shapes(case.arch).items():
        tensors[name] = draw.integers(0, np.iinfo(kind).max, shape, dtype=kind, endpoint=True)
        tensors[name].flat[0] = POISON[dtype] + 2  # at least one NaN payload a tensor
    return tensors


def fill(params, tensors: dict[str, np.ndarray], background: int, dtype: str) -> dict[str, np.ndarray]:
    """Local parameters by each of their names; what is in no box is ``background``."""
    filled = {}
    for param in params:
        local = np.full(param.shape, background, BITS[dtype])
        for box in param.boxes:
            local[box.local_slices] = tensors[box.hf_name][box.hf_slices]
        filled[param.names[-1]] = local  # the last alias: the transport must find it
    return filled


def as_torch(arrays: dict[str, np.ndarray], dtype: str):
    """The same bits as tensors of ``dtype``, in memory of their own."""
    import torch

    signed = {2: np.int16, 4: np.int32}
    return {
        name: torch.from_numpy(array.copy().view(signed[array.itemsize])).view(getattr(torch, dtype))
        for name, array in arrays.items()
    }


def as_numpy(tensors, dtype: str) -> dict[str, np.ndarray]:
    import torch

    signed = {2: torch.int16, 4: torch.int32}
    return {n: t.view(signed[t.element_size()]).numpy().view(BITS[dtype]) for n, t in tensors.items()}


class Member:
    """One process of a run: its plan, its group, its parameters, sender or receiver."""

    def __init__(
        self, case: Case, port: int, name: str, *, dtype: str, bucket_bytes: int, timeout_s: float, wrap=None,
        shared: bool = False,
    ) -> None:  # fmt: skip
        from megatron_tropd.parallel.side_group import join_store, side_group
        from megatron_tropd.weights.coordinates.engine_boxes import engine_boxes
        from megatron_tropd.weights.coordinates.megatron_boxes import rank_boxes
        from megatron_tropd.weights.plan.planner import build_plan
        from megatron_tropd.weights.transport.receiver import PlannedReceiver
        from megatron_tropd.weights.transport.sender import PlannedSender

        self.case, self.dtype, self.rank = case, dtype, int(os.environ["RANK"])
        self.plan = build_plan(case.arch, case.layout, case.engines, dtype=dtype, bucket_bytes=bucket_bytes)
        store = join_store(port=port, timeout_s=60)
        self.group = side_group(
            store, name=name, rank=self.rank, world_size=case.processes, backend="gloo", timeout_s=60
        )
        self.wrapped = group = wrap(self.group) if wrap else self.group
        connection = {"timeout_s": timeout_s, "shared": shared}
        world = case.layout.world_size
        self.sends = self.rank < world
        if self.sends:
            self.boxes = rank_boxes(case.arch, case.layout, self.rank)
            self.params = as_torch(fill(self.boxes, hf_bits(case, 0, dtype), POISON[dtype], dtype), dtype)
            self.sender = PlannedSender(self.plan, self.rank, self.params, group, **connection)
            return
        engine, rank = next(
            (number, at)
            for number, cut in enumerate(case.engines)
            for at in range(cut.tp)
            if self.plan.group_rank(number, at) == self.rank
        )
        self.boxes = engine_boxes(case.arch, case.engines[engine], rank)
        zeros = {p.names[-1]: np.zeros(p.shape, BITS[dtype]) for p in self.boxes}
        self.params = as_torch(zeros, dtype)
        self.receiver = PlannedReceiver(self.plan, engine, rank, self.params, group, **connection)

    def train(self, version: int) -> None:
        """New weights in the same memory; padding stays poisoned."""
        new = as_torch(
            fill(self.boxes, hf_bits(self.case, version, self.dtype), POISON[self.dtype], self.dtype), self.dtype
        )
        for name, tensor in self.params.items():
            tensor.copy_(new[name])

    def update(self, version: int):
        """This rank's part of one update."""
        if self.sends:
            self.train(version)
            return self.sender.push(version)
        return self.receiver.receive(version)

    def differing(self, version: int) -> list[str]:
        """Parameters of an engine rank whose bits are not those of ``version``, zero padding included."""
        expected = fill(self.boxes, hf_bits(self.case, version, self.dtype), 0, self.dtype)
        mine = as_numpy(self.params, self.dtype)
        return [name for name in expected if not np.array_equal(mine[name], expected[name])]


def elsewhere(hidden: bool):
    """Handles made here name another process, as they would on another machine: nobody can open this rank's memory."""
    return patch.object(os, "getpid", lambda: 1) if hidden else nullcontext()


def shared_mappings() -> list[str]:
    """What this process still holds of shared staging memory."""
    with open("/proc/self/maps") as maps:
        held = [line.strip() for line in maps if "memfd:tropd" in line]
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return held + [link for link in links if os.path.islink(link) and "memfd:tropd" in os.readlink(link)]


def deliver(
    case: Case, port: int, name: str, dtype: str, bucket_bytes: int, versions: int, *, shared: bool = False,
    hidden: tuple[int, ...] = (),
):  # fmt: skip
    """Body: every version in turn; the last report and the number of buckets, None when this rank has no part.

    Args:
        hidden: Trainer ranks whose memory nobody can open.
    """
    if int(os.environ["RANK"]) >= case.processes:
        return None
    with elsewhere(int(os.environ["RANK"]) in hidden):
        member = Member(case, port, name, dtype=dtype, bucket_bytes=bucket_bytes, timeout_s=60, shared=shared)
    report = None
    for version in range(1, versions + 1):
        report = member.update(version)
        assert report.version == version
        if not member.sends:
            assert not member.differing(version), member.differing(version)[:5]
            assert member.receiver.version == version and not member.receiver.partial
    num_buckets = member.plan.num_buckets
    del member
    gc.collect()
    assert not shared_mappings()
    return report, num_buckets
