"""Rollouts as one tensor of bytes: in checkpoints, and between processes that share no collective.

The bytes are those of a safetensors file.  Log-probabilities are kept as float64, so that a rollout comes back as it
was, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from safetensors.torch import load, save
from torch import Tensor

from megatron_tropd.types import Finish, Rollout

_FINISHES: tuple[Finish, ...] = get_args(Finish)
_COLUMNS = 9


def encode_rollouts(rollouts: Sequence[Rollout]) -> Tensor:
    """Return the rollouts as bytes, uint8 [B]."""
    rows = [
        (
            r.prompt_uid, r.sample_index, len(r.token_ids), r.prompt_len, r.guidance_len, _FINISHES.index(r.finish),
            len(r.logprobs), *r.weight_version,
        )
        for r in rollouts
    ]  # fmt: skip
    data = save(
        {
            "rows": torch.tensor(rows, dtype=torch.int64).reshape(len(rows), _COLUMNS),
            "token_ids": torch.tensor([t for r in rollouts for t in r.token_ids], dtype=torch.int32),
            "logprobs": torch.tensor([p for r in rollouts for p in r.logprobs], dtype=torch.float64),
        }
    )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def decode_rollouts(data: Tensor | bytes) -> list[Rollout]:
    """Return the rollouts of :func:`encode_rollouts`.

    Raises:
        ValueError: these are not the bytes of rollouts.
    """
    try:
        parts = load(data if isinstance(data, bytes) else bytes(data.cpu().numpy().tobytes()))
        token_ids, logprobs = parts["token_ids"].tolist(), parts["logprobs"].tolist()
        rollouts, token, written = [], 0, 0
        for uid, sample, length, prompt_len, guidance_len, finish, num_written, low, high in parts["rows"].tolist():
            rollouts.append(
                Rollout(
                    prompt_uid=uid, sample_index=sample, token_ids=tuple(token_ids[token : token + length]),
                    prompt_len=prompt_len, guidance_len=guidance_len,
                    logprobs=tuple(logprobs[written : written + num_written]), weight_version=(low, high),
                    finish=_FINISHES[finish],
                )
            )  # fmt: skip
            token, written = token + length, written + num_written
    except Exception as error:  # of safetensors, of a missing field, or of a rollout whose parts do not fit
        raise ValueError(f"not a batch of rollouts: {error}") from error
    return rollouts
