"""Random weights by Hugging Face name, equal in every process of a machine, made on the device."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.weights.coordinates.box import ParamBoxes
from megatron_tropd.weights.coordinates.hf_shapes import EMBED_TOKENS, LM_HEAD, hf_shapes
from megatron_tropd.weights.coordinates.megatron_boxes import rank_boxes

_LOGIT_STD = 2.0
"""Of logits from hidden states whose mean square is 1: neither uniform nor certain."""


def hf_tensor(name: str, shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype, version: int) -> Tensor:
    """Return a tensor of the checkpoint ``version``: a function of the arguments alone, on any one kind of device."""
    generator = torch.Generator(device=device).manual_seed(zlib.crc32(f"{name} {version}".encode()))
    values = torch.randn(shape, generator=generator, device=device)
    if len(shape) == 1:
        return values.mul_(0.1).add_(1.0).to(dtype)
    gain = _LOGIT_STD if name in (EMBED_TOKENS, LM_HEAD) else 0.5
    return values.mul_(gain / shape[1] ** 0.5).to(dtype)


def hf_tensors(
    arch: Architecture, *, device: torch.device, dtype: torch.dtype, version: int = 0
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the checkpoint ``version``."""
    for name, shape in hf_shapes(arch).items():
        yield name, hf_tensor(name, shape, device=device, dtype=dtype, version=version)


@torch.no_grad()
def fill(params: Mapping[str, Tensor], boxes: Iterable[ParamBoxes], arch: Architecture, *, version: int) -> None:
    """Write the checkpoint ``version`` into a rank's parameters; what is in no box keeps its values."""
    shapes = hf_shapes(arch)
    for wanted in boxes:
        target = next(params[name] for name in wanted.names if name in params)
        for box in wanted.boxes:
            whole = hf_tensor(
                box.hf_name, shapes[box.hf_name], device=target.device, dtype=target.dtype, version=version
            )
            target[box.local_slices].copy_(whole[box.hf_slices])


def fill_megatron(
    params: Mapping[str, Tensor], arch: Architecture, layout: ParallelLayout, rank: int, *, version: int
) -> None:
    """Write the checkpoint ``version`` into the parameters of a GPTModel, by its names."""
    fill(params, rank_boxes(arch, layout, rank), arch, version=version)


@torch.no_grad()
def differing(
    params: Mapping[str, Tensor], boxes: Iterable[ParamBoxes], arch: Architecture, *, version: int
) -> list[str]:
    """Return the names of the parameters that do not hold the checkpoint ``version``, bit for bit."""
    shapes, wrong = hf_shapes(arch), []
    for wanted in boxes:
        name = next(name for name in wanted.names if name in params)
        for box in wanted.boxes:
            held = params[name][box.local_slices]
            whole = hf_tensor(box.hf_name, shapes[box.hf_name], device=held.device, dtype=held.dtype, version=version)
            if not torch.equal(held, whole[box.hf_slices]):
                wrong.append(name)
                break
    return wrong


def digest(tensors: Iterable[Tensor]) -> str:
    """Return a number over the bits of the tensors, in order, that changes with any one bit."""
    total = 0
    for tensor in tensors:
        total = zlib.crc32(_bits(tensor).to_bytes(8, "little", signed=True), total)
    return f"{total:08x}"


_SLICE = 1 << 24
"""Elements whose bits are 64-bit integers at one time."""


@torch.no_grad()
def _bits(tensor: Tensor) -> int:
    """Return the sum of the elements' bits times odd weights, modulo 2^64."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.detach().contiguous().flatten().view(kind)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(flat), _SLICE):
        part = flat[start : start + _SLICE].long()
        total += (part * (2 * torch.arange(start, start + len(part), device=flat.device) + 1)).sum()
    return int(total)
