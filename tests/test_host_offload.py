"""Tensors in host memory between uses.  Without a GPU the device is the CPU: the bookkeeping is the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tropd.parallel.host_offload import BLOCK_BYTES, HostBlocks, HostOffload, block_sizes

MIB = 1 << 20


@given(num_bytes=st.integers(0, 1 << 36))
def test_blocks_are_powers_of_two_and_waste_less_than_a_mebibyte(num_bytes):
    sizes = block_sizes(num_bytes)
    assert all(size & (size - 1) == 0 and size <= BLOCK_BYTES for size in sizes)
    assert num_bytes <= sum(sizes) < num_bytes + MIB
    assert sizes == sorted(sizes, reverse=True)


def test_sizes_by_hand():
    assert block_sizes(0) == []
    assert block_sizes(256 * MIB) == [256 * MIB]
    assert block_sizes(600 * MIB) == [256 * MIB, 256 * MIB, 64 * MIB, 16 * MIB, 8 * MIB]
    assert block_sizes(MIB + 1) == [MIB, 1]


def _tensors(generator):
    """Of several sizes, shapes and dtypes; one is larger than a block of 4 KiB, one a scalar."""
    return [
        torch.nn.Parameter(torch.randn(3, 5, generator=generator)),
        torch.nn.Parameter(torch.randn(70, 50, generator=generator).bfloat16()),
        torch.randn((), generator=generator),
        torch.randint(0, 99, (7,), generator=generator),
        torch.nn.Parameter(torch.randn(257, generator=generator).half(), requires_grad=False),
    ]


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), largest=st.sampled_from([64, 1024, 4096, MIB]), cycles=st.integers(1, 4))
def test_values_and_objects_outlive_any_number_of_cycles(seed, largest, cycles):
    tensors = _tensors(torch.Generator().manual_seed(seed))
    expected = [tensor.detach().clone() for tensor in tensors]
    offload = HostOffload(tensors, blocks=HostBlocks(pin=False, largest=largest))
    for _ in range(cycles):
        assert offload.state == "host" and all(tensor.numel() == 0 for tensor in tensors)
        offload.prefetch()
        assert offload.state == "loading"
        offload.wait()
        for tensor, value in zip(tensors, expected, strict=True):
            assert torch.equal(tensor, value) and tensor.dtype == value.dtype and tensor.shape == value.shape
            assert tensor.data_ptr() % value.itemsize == 0
        tensors[0].data.zero_()  # what is changed on the device is not kept
        offload.release()
    offload.load()
    assert torch.equal(tensors[0], expected[0])


def test_a_model_computes_the_same_and_tied_parameters_stay_tied():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(11, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 11, bias=False))
    model[2].weight = model[0].weight  # the same object
    other = torch.nn.Parameter(model[1].bias.data)  # another object with the same memory
    before, out = list(model.parameters()), model(torch.arange(11))
    offload = HostOffload([*model.parameters(), other])
    with pytest.raises(RuntimeError):
        model(torch.arange(11))
    offload.load()
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert torch.equal(model(torch.arange(11)), out) and model[2].weight is model[0].weight
    other.data.fill_(3.0)
    assert torch.equal(model[1].bias, other), "they are no longer tied"


def test_bytes_are_counted():
    offload = HostOffload([torch.zeros(3), torch.zeros(1000, dtype=torch.float64)])
    assert offload.device_bytes == 256 + 8000  # the second begins at a multiple of 256
    assert offload.host_bytes == 1 << 14  # below a mebibyte: the next power of two
    assert HostOffload([]).device_bytes == HostOffload([]).host_bytes == 0


def test_blocks_are_used_again():
    blocks = HostBlocks(pin=False)
    big, small = torch.arange(1000.0), torch.arange(7)
    HostOffload([big], blocks=blocks).load()
    held, address = blocks.num_bytes, next(blocks.pieces(0, 1))[0].data_ptr()
    HostOffload([small], blocks=blocks).load()
    assert torch.equal(small, torch.arange(7)) and torch.equal(big, torch.arange(1000.0))
    assert blocks.num_bytes == held and next(blocks.pieces(0, 1))[0].data_ptr() == address


def test_misuse_is_refused():
    offload = HostOffload([torch.zeros(3)])
    with pytest.raises(RuntimeError, match=r"wait\(\) needs the tensors in state 'loading'; they are in 'host'"):
        offload.wait()
    with pytest.raises(RuntimeError, match="release"):
        offload.release()
    offload.prefetch()
    for call in (offload.prefetch, offload.load, offload.release):
        with pytest.raises(RuntimeError, match="they are in 'loading'"):
            call()
    offload.wait()
    with pytest.raises(RuntimeError, match="they are in 'device'"):
        offload.prefetch()


def test_tensors_that_cannot_be_moved_are_refused_before_anything_changes():
    whole = torch.arange(12.0)
    for tensors, message in (
        ([whole.view(3, 4).t()], "is not contiguous"),
        ([whole, torch.zeros(2, device="meta")], "not on cpu"),
        ([whole, whole[2:5]], "share a part of their memory"),
    ):
        with pytest.raises(ValueError, match=message):
            HostOffload(tensors)
        assert whole.numel() == 12
