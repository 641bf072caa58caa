"""Buckets of weights for a server: every byte once, bounded memory, and the version with the last one."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import threading

import psutil
import pytest
import torch

from megatron_tropd.rollout.sglang.api.weight_buckets import (
    BucketBuilder,
    WeightBucket,
    bytes_message,
    shared_message,
    update_body,
)


def test_buckets_hold_every_byte_once_and_no_more_than_the_limit():
    generator = torch.Generator().manual_seed(0)
    tensors = {f"t{i}": torch.randint(-99, 99, (i + 1, 3), dtype=torch.int16, generator=generator) for i in range(20)}
    tensors["big"] = torch.arange(500.0)
    tensors["bf16"] = torch.randn(3, 3).bfloat16().T
    builder = BucketBuilder(300)
    buckets = [full for name, tensor in tensors.items() if (full := builder.add(name, tensor))]
    buckets.append(builder.close())
    arrived = {}
    for bucket in buckets:
        message = pickle.loads(bytes_message(bucket))  # noqa: S301 (our own bytes)
        assert message["flattened_tensor"].nbytes <= 300 or bucket.names == ("big",)
        for place in message["metadata"]:
            piece = message["flattened_tensor"][place.start_idx : place.end_idx]
            arrived[place.name] = piece.view(place.dtype).reshape(place.shape)
    assert list(arrived) == list(tensors) and all(torch.equal(arrived[name], tensors[name]) for name in tensors)


def test_the_version_travels_with_the_last_bucket_and_flushes():
    first = json.loads(update_body([b"x", b"y"], weight_version=None))
    assert first["flush_cache"] is False and first["weight_version"] is None
    assert first["serialized_named_tensors"] == ["eA==", "eQ=="]
    last = json.loads(update_body([b"x"], weight_version="12"))
    assert last["flush_cache"] is True and last["weight_version"] == "12"


def _bucket(value: float) -> WeightBucket:
    builder = BucketBuilder(1 << 20)
    builder.add("t", torch.full((100,), value))
    return builder.close()


def test_memory_is_shared_although_torchs_manager_of_it_is_busy():
    """torch waits for it for a second only."""
    shared_message(_bucket(1.0))  # starts the manager
    managers = [child for child in psutil.Process().children() if child.name().startswith("torch_shm")]
    assert managers
    for manager in managers:
        manager.suspend()
        threading.Timer(1.5, manager.resume).start()
    message = pickle.loads(shared_message(_bucket(2.0)))  # noqa: S301 (our own bytes)
    assert torch.equal(message["flattened_tensor"].view(torch.float32)[:100], torch.full((100,), 2.0))


_PEAK = """
import resource, sys
import torch
from megatron_tropd.rollout.sglang.api.weight_buckets import BucketBuilder, bytes_message, update_body
torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
builder, sent = BucketBuilder(16 << 20), 0
for i in range(int(sys.argv[1])):
    if bucket := builder.add(f"t{i}", torch.full((1 << 20,), float(i))):  # 4 MiB each
        sent += len(update_body([bytes_message(bucket)], weight_version=None))
    del bucket
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, sent >> 20)
"""


@pytest.mark.slow
def test_memory_of_a_push_depends_on_the_bucket_not_on_the_model():
    peaks = []
    for tensors in (32, 160):  # 128 and 640 MiB in buckets of 16
        output = subprocess.run(
            [sys.executable, "-c", _PEAK, str(tensors)], capture_output=True, text=True, timeout=300, check=True
        ).stdout
        peak_kib, sent_mib = map(int, output.split())
        assert sent_mib > tensors * 4
        peaks.append(peak_kib / 1024)
    assert max(peaks) < 8 * 16 and abs(peaks[1] - peaks[0]) < 32, peaks
