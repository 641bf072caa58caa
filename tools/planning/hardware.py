"""GPUs by name, and what share of their peaks a program reaches.

The peaks are those of NVIDIA's data sheets: dense FLOP/s without sparsity, memory as sold in decimal bytes, NVLink per
direction, PCIe per direction, and one network card per GPU as DGX systems of the kind have it.  The shares are
assumptions: nothing here was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Peaks of one GPU and of its connections."""

    name: str
    memory: float
    """Bytes."""
    flops_bf16: float
    """FLOP/s of matrix products in bf16 with fp32 sums."""
    flops_fp32: float
    """FLOP/s of matrix products in fp32; torch leaves TF32 off."""
    bandwidth: float
    """Bytes/s of its memory."""
    nvlink: float
    """Bytes/s to the other GPUs of its node, in one direction."""
    network: float
    """Bytes/s to other nodes, in one direction."""
    host: float
    """Bytes/s to host memory, in one direction."""

    def flops(self, *, bf16: bool) -> float:
        """Return the peak FLOP/s in a dtype."""
        return self.flops_bf16 if bf16 else self.flops_fp32


def _gpu(
    name: str, gb: float, bf16: float, fp32: float, bandwidth: float, nvlink: float, network: float, host: float
) -> Gpu:
    return Gpu(
        name=name, memory=gb * 1e9, flops_bf16=bf16 * 1e12, flops_fp32=fp32 * 1e12, bandwidth=bandwidth * 1e12,
        nvlink=nvlink * 1e9, network=network * 1e9, host=host * 1e9,
    )  # fmt: skip


GPUS = {
    gpu.name: gpu
    for gpu in (
        # name, GB, TFLOP/s in bf16 and fp32, TB/s of memory, GB/s of NVLink, network and PCIe
        _gpu("a100-40gb", 40, 312, 19.5, 1.555, 300, 25, 32),
        _gpu("a100-80gb", 80, 312, 19.5, 2.039, 300, 25, 32),
        _gpu("h100", 80, 989, 67, 3.35, 450, 50, 64),
        _gpu("h200", 141, 989, 67, 4.8, 450, 50, 64),
        _gpu("b200", 180, 2250, 80, 8.0, 900, 50, 64),
    )
}
"""GPUs by the value of ``--gpu``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Shares of a peak that a program reaches, and fixed costs.  All of them are assumptions."""

    score: float = 0.5
    """Of peak FLOP/s in a forward pass over packed sequences: the goal of section d of tools/gpu_acceptance.py."""
    train: float = 0.45
    """Of peak FLOP/s in forward and backward, with what is computed again counted as work."""
    decode_bandwidth: float = 0.6
    """Of the memory's bandwidth in decoding, which reads weights and KV cache for every token."""
    decode_flops: float = 0.4
    """Of peak FLOP/s in decoding with so many sequences that products limit it."""
    link: float = 0.7
    """Of NVLink, network and PCIe."""
    sglang_step_s: float = 2e-3
    """Seconds that SGLang adds to each decoding step: scheduling, sampling, launching a CUDA graph."""
    embedded_layer_s: float = 5e-4
    """Seconds a layer and step that transformers' code needs in Python and in launches, whatever its batch."""
    http: float = 1e9
    """Bytes/s of base64 text over HTTP to one server."""
