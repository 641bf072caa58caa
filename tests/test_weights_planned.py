"""Planned updates between real processes: byte for byte, within their memory, and failing closed."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import time
from dataclasses import replace

import psutil
import pytest
import torch

from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.parallel.side_group import host_store
from megatron_tropd.weights.coordinates.engine_boxes import EngineLayout
from megatron_tropd.weights.transport.channel import DATA_TAG
from tests.planned_ranks import Member, deliver, serve, shared_mappings
from tests.ranks import RankPool
from tests.weight_cases import CASES, Case, arch
from tests.weight_cases import _case as make_case

BUCKET = 4096
_names = itertools.count()


@pytest.fixture(scope="module")
def store():
    return host_store(timeout_s=60)


@pytest.fixture(scope="module")
def pool():
    processes = RankPool(8, serve)
    yield processes
    processes.kill()


def _new_name() -> str:
    return f"update{next(_names)}"


SHARED = (
    "tied, pipeline, two engines", "key/value heads repeated", "virtual pipeline", "engines of several widths",
    "experts in parts",
)  # fmt: skip


@pytest.mark.parametrize(("name", "shared"), [*((name, False) for name in CASES), *((name, True) for name in SHARED)])
def test_every_byte_arrives_in_three_versions(pool, store, name, shared):
    """Random bits with NaN payloads, poisoned source padding; destination padding stays zero."""
    case = CASES[name]
    assert case.processes <= 8
    answers = pool.run(deliver, case, store.port, _new_name(), "bfloat16", BUCKET, 3, shared=shared)[: case.processes]
    reports, world = [report for report, _ in answers], case.layout.world_size
    sent, received = (sum(report.payload_bytes for report in part) for part in (reports[:world], reports[world:]))
    assert sent == received > 0
    assert all(report.staging_bytes <= BUCKET for report in reports)
    assert all(report.shared_bytes == report.payload_bytes * shared for report in reports)
    assert all(report.staging_bytes == 0 for report in reports[world:]) == shared, "a receiver needs none of its own"
    assert answers[0][1] > 2, "one bucket proves little"


def test_pairs_that_cannot_share_send_messages(pool, store):
    """Of four trainer ranks, two are as if on another machine; every engine rank hears of both kinds."""
    case = CASES["fewer key/value heads than ranks on both sides"]
    bodies = {"shared": True, "hidden": (0, 3)}
    answers = pool.run(deliver, case, store.port, _new_name(), "bfloat16", BUCKET, 3, **bodies)
    for rank, (report, _) in enumerate(answers[:4]):
        assert report.shared_bytes == (0 if rank in (0, 3) else report.payload_bytes)
    received = [report for report, _ in answers[4:]]
    assert any(0 < report.shared_bytes < report.payload_bytes for report in received)
    assert all(report.staging_bytes <= BUCKET for report in received)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes(pool, store, dtype):
    pool.run(deliver, CASES["key/value heads repeated"], store.port, _new_name(), dtype, BUCKET, 1)


def _resident_mib(field: str) -> float:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _push_and_measure(port, name, layers, bucket_bytes, shared):
    """Body of a pair: (MiB of weights, MiB that resident memory rose during a push, MiB of staging)."""
    from megatron_tropd.weights.transport.receiver import PlannedReceiver
    from megatron_tropd.weights.transport.sender import PlannedSender

    if int(os.environ["RANK"]) >= 2:
        return None
    model = replace(arch("llama", layers=layers), vocab_size=8192, hidden_size=512, ffn_hidden_size=2048)
    case = Case(arch=model, layout=ParallelLayout(), engines=(EngineLayout(),))
    member = Member(case, port, name, dtype="bfloat16", bucket_bytes=bucket_bytes, timeout_s=60)
    member.sender.push(1) if member.sends else member.receiver.receive(1)  # code, sockets, threads
    weights = sum(tensor.numel() * tensor.element_size() for tensor in member.params.values()) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free must not hide what is taken
    before = _resident_mib("VmRSS")
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the high-water mark begins anew
    options = {"timeout_s": 60, "shared": shared}
    if member.sends:  # an endpoint of its own: its staging memory is touched here for the first time
        report = PlannedSender(member.plan, 0, member.params, member.group, **options).push(2)
    else:
        receiver = PlannedReceiver(member.plan, 0, 0, member.params, member.group, **options)
        report = receiver.receive(2)
    return weights, _resident_mib("VmHWM") - before, report.staging_bytes / 2**20


@pytest.mark.parametrize("shared", [False, True])
def test_extra_memory_is_the_bucket_not_the_model(pool, store, measured, shared):
    """Two model sizes, one bucket size: resident memory rises by the bucket and a little of the process's own, not with
    the model.  Shared, the receiver's is the sender's, and it has none besides."""
    bucket_mib, how = 8, "in shared memory" if shared else "by messages"
    small, large = (
        pool.run(_push_and_measure, store.port, _new_name(), layers, bucket_mib << 20, shared)[:2] for layers in (2, 14)
    )
    for side, what in enumerate(("sender", "receiver")):
        assert large[side][0] > 2.5 * small[side][0] > 5 * bucket_mib
        for weights, risen, staging in (small[side], large[side]):
            own = 0 if shared and what == "receiver" else 0.8 * bucket_mib
            assert own <= staging <= (own and bucket_mib)
            assert risen > 0.8 * bucket_mib, "the measurement does not see the staging memory"
            claim = f"MiB a {what}'s memory rises, {weights:.0f} MiB through a bucket of 8 {how}"
            measured(claim, risen, 1.5 * bucket_mib)


class _Tampering:
    """A group that changes data on its way, or loses its process: what a faulty wire or a confused peer would do."""

    def __init__(self, group, change) -> None:
        self._group, self._change = group, change
        self.rank, self.size = group.rank, group.size
        self.messages = 0

    def _count(self, data, tag):
        if tag == DATA_TAG:
            self.messages += 1
            self._change(self.messages, data)

    def send(self, tensors, peer, tag):
        self._count(tensors[0], tag)
        return self._group.send(tensors, peer, tag)

    def recv(self, tensors, peer, tag):
        self._count(tensors[0], tag)
        return self._group.recv(tensors, peer, tag)


def _corrupt(number, message):
    if number == 3:
        message[-1] ^= 1


def _older_version(number, message):
    if number == 3:
        message[8] = 1  # the version's lowest byte


def _other_bucket(number, message):
    if number == 3:
        message[16] += 1


def _no_header(number, message):
    if number == 3:
        message[0] = 0


def _die(number, message):
    if number == 3:
        os._exit(7)


def _hang(number, message):
    if number == 3:
        time.sleep(12)


PAIR = make_case(arch("llama", layers=4), {}, (1,))
CHANGES = {
    "corrupt": _corrupt, "version": _older_version, "bucket": _other_bucket, "header": _no_header, "die": _die,
    "hang": _hang,
}  # fmt: skip


def _faulty_update(port, name, change, timeout_s, again=False, shared=False, at=0):
    """Body of a pair: version 1 goes well, version 2 does not by the fault of rank ``at``; what each side said, and how
    long it took."""
    rank = int(os.environ["RANK"])
    if rank >= 2:
        return None
    armed = []

    def tamper(number, message):
        if not armed:
            return
        number -= armed[0]
        if shared and change == "corrupt" and number == 3:  # the tensors are not in the message
            sender = member.sender
            message = sender._staging.cut(number - 1, sender._buckets[number - 1])[0]
        CHANGES[change](number, message)

    member = Member(
        PAIR, port, name, dtype="bfloat16", bucket_bytes=BUCKET, timeout_s=timeout_s,
        wrap=(lambda group: _Tampering(group, tamper)) if rank == at else None, shared=shared,
    )  # fmt: skip
    member.update(1)
    if rank == at:
        armed.append(member.wrapped.messages)
    start = time.monotonic()
    try:
        member.update(2)
    except RuntimeError as error:
        said = f"{type(error).__name__}: {error}"
    else:
        said = "no error"
    seconds = time.monotonic() - start
    armed.clear()
    if member.sends:
        if again:
            member.update(3)
        return said, seconds, None, None
    state = (member.receiver.version, member.receiver.partial)
    if again:
        member.update(3)
        assert not member.differing(3)
        assert (member.receiver.version, member.receiver.partial) == (3, False)
    return said, seconds, state, member.receiver.broken


@pytest.mark.parametrize(
    ("change", "reason", "shared"),
    [
        ("corrupt", "checksum", False),
        ("corrupt", "checksum", True),
        ("version", "version 1 instead of 2", False),
        ("version", "version 1 instead of 2", True),
        ("bucket", "bucket 3 instead of 2", False),
        ("header", "no header of this format", False),
    ],
)
def test_a_wrong_message_is_refused_and_the_next_update_heals(pool, store, change, reason, shared):
    sender, receiver = pool.run(_faulty_update, store.port, _new_name(), change, 60, again=True, shared=shared)[:2]
    assert reason in receiver[0] and "model." in receiver[0] and "engine 0 rank 0" in receiver[0]
    assert "engine 0 rank 0 did not take version 2" in sender[0]
    assert receiver[2] == (1, True), "no version advance, and partial"


@pytest.mark.parametrize(("at", "shared"), [(0, False), (1, True)])
def test_a_peer_that_falls_silent_is_noticed_within_the_timeout(pool, store, at, shared):
    """The sender without, the receiver with shared memory, which the sender then must not fill again."""
    answers = pool.run(_faulty_update, store.port, _new_name(), "hang", 3, shared=shared, at=at)[:2]
    said, seconds, *_ = answers[1 - at]
    assert seconds < 11
    assert f"TransportError: bucket {2 if at == 0 else 1} (model." in said, "at 1, not yet taken"
    assert "from trainer rank 0 to engine 0 rank 0 failed" in said
    assert "TransportError" in answers[at][0] and answers[1][2] == (1, True) and answers[1][3]


@pytest.mark.parametrize(("at", "shared"), [(0, False), (1, True)])
@pytest.mark.fault(number=20)
def test_a_peer_that_dies_is_noticed_at_once(store, at, shared):
    """The sender without, the receiver with shared memory, of which nothing is left afterwards."""
    pair = RankPool(2, serve)
    start = time.monotonic()
    with pytest.raises(AssertionError, match=f"rank {at} died") as death:
        pair.run(_die_and_tell, store.port, _new_name(), at, shared)
    text = str(death.value)
    assert "from trainer rank 0 to engine 0 rank 0 failed" in text
    assert ("(1, True)" in text) == (at == 0), "a receiver is partial"
    assert "left: []" in text
    assert time.monotonic() - start < 60


def _die_and_tell(port, name, at, shared):
    outcome = _faulty_update(port, name, "die", 50, shared=shared, at=at)
    gc.collect()
    raise AssertionError(f"{outcome} left: {shared_mappings()}")


def _read_slowly(port, name):
    """Body of a pair: the receiver is slower than the sender by far."""
    if int(os.environ["RANK"]) >= 2:
        return
    member = Member(PAIR, port, name, dtype="bfloat16", bucket_bytes=BUCKET, timeout_s=60, shared=True)
    if member.sends:
        member.update(1)
        return
    unpack = member.receiver._unpack

    def slow(message, part):
        time.sleep(0.05)
        unpack(message, part)

    member.receiver._unpack = slow
    member.update(1)
    assert not member.differing(1)


def test_memory_that_is_still_being_read_is_not_filled_again(pool, store):
    pool.run(_read_slowly, store.port, _new_name())


def _disagree(port, name, kind):
    rank = int(os.environ["RANK"])
    if rank >= 2:
        return None
    bucket = BUCKET * (1 + (kind == "plan" and rank))
    member = Member(PAIR, port, name, dtype="bfloat16", bucket_bytes=bucket, timeout_s=60)
    with pytest.raises(RuntimeError) as refused:
        member.update(5 + (kind == "version" and rank))
    if not member.sends:
        assert (member.receiver.version, member.receiver.partial) == (-1, False), "nothing was touched"
        assert all(not tensor.view(torch.int16).any() for tensor in member.params.values())
    return str(refused.value)


@pytest.mark.parametrize(("kind", "reason"), [("plan", "digest"), ("version", "version 5 instead of 6")])
def test_both_sides_refuse_before_any_data_when_they_disagree(pool, store, kind, reason):
    sender, receiver = pool.run(_disagree, store.port, _new_name(), kind)[:2]
    assert "engine 0 rank 0 and this rank do not agree" in sender
    assert "trainer rank 0 and this rank do not agree" in receiver and reason in receiver


def _stale(port, name):
    rank = int(os.environ["RANK"])
    if rank >= 2:
        return
    member = Member(PAIR, port, name, dtype="bfloat16", bucket_bytes=BUCKET, timeout_s=60)
    member.update(4)
    if not member.sends:
        for version in (3, 4):
            with pytest.raises(RuntimeError, match=f"engine 0 rank 0 has version 4; version {version} is not later"):
                member.receiver.receive(version)


def test_an_update_that_is_not_later_is_refused(pool, store):
    pool.run(_stale, store.port, _new_name())


def _beside_a_world(port, world_port, name):
    """The side group works in processes that have a default group, and leaves it working."""
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    case = CASES["tied, pipeline, two engines"]
    members = 4 if rank < 4 else 0  # the trainer's world; each engine rank is alone
    if members:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{world_port}", rank=rank, world_size=4)
    deliver(case, port, name, "bfloat16", BUCKET, 1)
    if members:
        total = torch.tensor([rank])
        dist.all_reduce(total)
        dist.destroy_process_group()
        return total.item()
    return None


def test_beside_a_default_group(pool, store):
    from tests.ranks import free_port

    assert pool.run(_beside_a_world, store.port, free_port(), _new_name()) == [6] * 4 + [None] * 4


def _wrong_parameters(port, name):
    from megatron_tropd.weights.transport.receiver import PlannedReceiver

    if int(os.environ["RANK"]) != 1:
        if int(os.environ["RANK"]) == 0:
            Member(PAIR, port, name, dtype="bfloat16", bucket_bytes=BUCKET, timeout_s=60)
        return []
    member = Member(PAIR, port, name, dtype="bfloat16", bucket_bytes=BUCKET, timeout_s=60)
    name = "model.layers.1.mlp.down_proj.weight"
    said = []
    for replacement in (None, member.params[name].float(), member.params[name][:-1].clone()):
        changed = {**member.params, name: replacement}
        if replacement is None:
            del changed[name]
        with pytest.raises(ValueError) as refused:
            PlannedReceiver(member.plan, 0, 0, changed, member.group, timeout_s=1)
        said.append(str(refused.value))
    assert torch.is_tensor(member.params[name])
    return said


def test_parameters_that_do_not_fit_the_plan_are_refused(pool, store):
    missing, dtype, shape = pool.run(_wrong_parameters, store.port, _new_name())[1]
    assert "model.layers.1.mlp.down_proj.weight: the module has 0 of" in missing
    assert "is torch.float32, the plan is for bfloat16" in dtype
    assert "has shape [15, 24]; the plan needs at least [16, 24]" in shape


def test_the_store_listens_on_its_own_address_only():
    store = host_store(timeout_s=20)
    listening = [c.laddr for c in psutil.Process().net_connections("tcp") if c.laddr.port == store.port]
    assert {address.ip for address in listening} == {"127.0.0.1"}
