"""Packed attention without Transformer Engine, against dense attention of each sequence in float64."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_tropd.models import attention
from megatron_tropd.setup.checks import attention_warnings

LENGTHS = (5, 1, 9, 3)
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


def _inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(11)
    tokens = sum(LENGTHS)
    query, key, value, to = (
        torch.randn(tokens, heads, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    sequences = SimpleNamespace(cu_seqlens_q=bounds, max_seqlen_q=max(LENGTHS))
    return [x.requires_grad_() for x in (query, key, value)], to, sequences


def _dense(query, key, value, bounds, scale):
    """Softmax over the tokens before, one sequence and head at a time."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(
            ~torch.ones(len(q[0]), len(q[0])).tril().bool(), -torch.inf
        )
        out.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


def _values_and_gradients(attend, inputs, to, *args):
    out = attend(*inputs, *args)
    return [out.detach(), *torch.autograd.grad(out, inputs, to)]


@pytest.mark.parametrize("scale", [None, 0.7])
def test_padded_attention_equals_dense(scale):
    inputs, to, sequences = _inputs()
    expected = _values_and_gradients(_dense, inputs, to, sequences.cu_seqlens_q, scale)
    found = _values_and_gradients(attention.padded_attention, inputs, to, sequences, scale)
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)


def _torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal and query.size(1) == key.size(1) and (max_q, max_k) == (max(LENGTHS), max(LENGTHS))
    return _dense(query, key, value, cu_seq_q, None)


def _torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    assert window_size == (-1, 0) and query.size(1) == key.size(1)
    return _dense(query, key, value, cu_seq_k, scale)


def _torch_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert window_size == (-1, 0) and enable_gqa and key.size(1) == KV_HEADS
    return _dense(query, key, value, cu_seq_q, scale)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("version", [_torch_2_10, _torch_2_11, _torch_2_12])
def test_flash_attention_is_called_as_its_version_wants(monkeypatch, version, scale):
    """The kernel itself needs a GPU; here a dense one with the arguments of each torch stands in for it."""
    monkeypatch.setattr(attention, "_varlen", lambda: version)
    inputs, to, sequences = _inputs()
    expected = _values_and_gradients(_dense, inputs, to, sequences.cu_seqlens_q, scale)
    found = _values_and_gradients(attention.varlen_attention, inputs, to, sequences, scale)
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)


def test_this_torch_has_the_arguments_of_one_of_these_versions():
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    known = set(inspect.signature(varlen_attn).parameters)
    assert {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"} <= known
    assert "window_size" in known or "is_causal" in known


def test_padded_attention_never_waits_for_the_device():
    """A tensor on the device ``meta`` has no values: an operation that had to wait for one would fail."""
    inputs, _, sequences = _inputs(torch.bfloat16)
    there = SimpleNamespace(cu_seqlens_q=sequences.cu_seqlens_q.to("meta"), max_seqlen_q=sequences.max_seqlen_q)
    out = attention.padded_attention(*(x.to("meta") for x in inputs), there, None)
    assert out.shape == inputs[0].shape


def _on_a_gpu(monkeypatch, capability=(9, 0), te=False, varlen=_torch_2_12):
    monkeypatch.setattr(attention.platform, "is_cuda", lambda: True)
    monkeypatch.setattr(attention.platform, "has_transformer_engine", lambda: te)
    monkeypatch.setattr(attention, "_varlen", lambda: varlen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU", raising=False)


def test_the_kind_of_attention(monkeypatch):
    assert attention.attention_kind(torch.bfloat16, 128) == ("padded", "there is no GPU")
    _on_a_gpu(monkeypatch)
    assert attention.attention_kind(torch.bfloat16, 128) == ("varlen", "")
    assert "--bf16" in attention.attention_kind(torch.float32, 128)[1]
    assert "512" in attention.attention_kind(torch.bfloat16, 512)[1]
    assert "steps of 8, not 100" in attention.attention_kind(torch.bfloat16, 100)[1]
    _on_a_gpu(monkeypatch, capability=(7, 5))
    assert "Ampere" in attention.attention_kind(torch.bfloat16, 128)[1]
    _on_a_gpu(monkeypatch, varlen=None)
    assert "2.10" in attention.attention_kind(torch.bfloat16, 128)[1]


def test_the_padded_form_on_a_gpu_is_warned_of_with_its_cost(monkeypatch):
    assert attention_warnings(torch.float32, {"student": 128}) == []  # no GPU: it is the only one
    _on_a_gpu(monkeypatch)
    assert attention_warnings(torch.bfloat16, {"student": 128, "teacher": 256}) == []
    (warning,) = attention_warnings(torch.bfloat16, {"student": 128, "teacher": 512})
    assert "teacher" in warning and "512" in warning and "longest squared" in warning
    _on_a_gpu(monkeypatch, te=True)
    assert attention_warnings(torch.bfloat16, {"student": 512}) == []
    (warning,) = attention_warnings(torch.float32, {"student": 128})  # Transformer Engine packs 16-bit numbers only
    assert "--bf16" in warning


@pytest.mark.slow
def test_neither_the_head_nor_scoring_waits_for_the_device():
    """In a process of its own, on tensors without values (tests/no_waiting.py): a wait raises."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.no_waiting"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("negative control: rows looked for") == "waits"
    assert found and set(found.values()) == {"runs ahead"}, found
