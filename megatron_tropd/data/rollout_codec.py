"""Rollouts as one tensor of bytes: in checkpoints, and between processes that share no collective.

The bytes are those of a safetensors file.  Log-probabilities are kept as float64, so that a rollout comes back as it
was, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    widths = [0 if r.topk_ids is None else r.topk_ids.shape[1] for r in rollouts]
    top = [r.topk_ids.reshape(-1) for r in rollouts if r.topk_ids is not None]
    data = save(
        {
            "topk_widths": torch.tensor(widths, dtype=torch.int32),
            "topk_ids": torch.cat(top) if top else torch.empty(0, dtype=torch.int32),
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
        rows = parts["rows"].tolist()
        top = _top_ids(parts, [row[6] for row in rows])
        rollouts, token, written = [], 0, 0
        for uid, sample, length, prompt_len, guidance_len, finish, num_written, low, high in rows:
            rollouts.append(
                Rollout(
                    prompt_uid=uid, sample_index=sample, token_ids=tuple(token_ids[token : token + length]),
                    prompt_len=prompt_len, guidance_len=guidance_len,
                    logprobs=tuple(logprobs[written : written + num_written]), weight_version=(low, high),
                    finish=_FINISHES[finish], topk_ids=next(top),
                )
            )  # fmt: skip
            token, written = token + length, written + num_written
    except Exception as error:  # of safetensors, of a missing field, or of a rollout whose parts do not fit
        raise ValueError(f"not a batch of rollouts: {error}") from error
    return rollouts


def _top_ids(parts: Mapping[str, Tensor], lengths: Sequence[int]) -> Iterator[Tensor | None]:
    """Yield ``Rollout.topk_ids`` of each; None where it had none, and of what an older version wrote."""
    widths = parts["topk_widths"].tolist() if "topk_widths" in parts else [0] * len(lengths)
    start = 0
    for width, length in zip(widths, lengths, strict=True):
        end = start + width * length
        yield parts["topk_ids"][start:end].reshape(length, width) if width else None
        start = end
