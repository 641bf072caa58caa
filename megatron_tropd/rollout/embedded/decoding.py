"""Batched autoregressive decoding with a transformers model and its own KV cache.

Shapes: ``B`` requests, ``A`` rows still in the batch, ``S`` longest request, ``N`` largest number of
new tokens, ``V`` vocabulary.  Requests are padded on the LEFT, so that all rows write the same column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from megatron_tropd import rng
from megatron_tropd.rollout.embedded.sampling import sample
from megatron_tropd.rollout.engine import SamplingParams
from megatron_tropd.types import Finish, GenerationRequest

_DROP_FINISHED_ABOVE = 0.25
"""Share of finished rows above which they are removed from the batch and the KV cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuation:
    """What the model wrote for one request; the stop token is included."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    topk_ids: Tensor | None = None  # [tokens, K] int32


def _left_pad(requests: Sequence[GenerationRequest], device: torch.device) -> tuple[Tensor, Tensor]:
    """(token ids [B, S] with id 0 as padding, number of padding columns [B])."""
    longest = max(len(request.token_ids) for request in requests)
    rows = [[0] * (longest - len(request.token_ids)) + list(request.token_ids) for request in requests]
    pads = [longest - len(request.token_ids) for request in requests]
    return torch.tensor(rows, device=device), torch.tensor(pads, device=device)


def _uniforms(requests: Sequence[GenerationRequest], params: SamplingParams, num_new: int) -> Tensor:
    """float64 [B, N], keyed by the position in the response (guidance counts)."""
    uids = torch.tensor([rng.sample_uid(request.prompt_uid, request.sample_index) for request in requests])
    first = torch.tensor([request.guidance_len for request in requests])
    stream_key = rng.key(params.seed, params.stream, params.step)
    return rng.uniform(stream_key, uids[:, None], first[:, None] + torch.arange(num_new))


def _prefill_mask(pads_B: Tensor, longest: int) -> Tensor:
    """bool [B, 1, S, S], True where a query may look.  A padding query sees itself: a row without a
    single True would give NaN, and NaN values spoil the real rows even at weight 0."""
    column = torch.arange(longest, device=pads_B.device)
    causal = column[None, :] <= column[:, None]
    real_key = column[None, :] >= pads_B[:, None]
    itself = torch.eye(longest, dtype=torch.bool, device=pads_B.device)
    return ((causal & real_key[:, None, :]) | itself)[:, None]


class _Batch:
    """The rows still decoding; ``row_A`` names them in the order of the requests."""

    def __init__(self, model: PreTrainedModel, requests: Sequence[GenerationRequest], device: torch.device) -> None:
        self.model = model
        self.cache = DynamicCache()
        self.ids, self.pads = _left_pad(requests, device)
        self.row_A = torch.arange(len(requests), device=device)
        self.alive_A = torch.ones_like(self.row_A, dtype=torch.bool)
        self.num_alive = len(requests)

    def prefill(self) -> Tensor:
        """fp32 logits [B, V] after the last given token."""
        longest = self.ids.shape[1]
        positions = (torch.arange(longest, device=self.pads.device) - self.pads[:, None]).clamp_(min=0)
        return self._forward(self.ids, _prefill_mask(self.pads, longest), positions)

    def advance(self, tokens_A: Tensor, column: int) -> Tensor:
        """fp32 logits [A, V] after ``tokens_A``, written to ``column`` of the padded sequences."""
        seen = torch.arange(column + 1, device=self.pads.device) >= self.pads[:, None]
        return self._forward(tokens_A[:, None], seen[:, None, None, :], (column - self.pads)[:, None])

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        # The head runs on the last column only: the prompt's logits are never needed.
        hidden = self.model.get_decoder()(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).last_hidden_state[:, -1]
        return self.model.get_output_embeddings()(hidden).float()

    def drop_finished(self) -> Tensor | None:
        """Remove finished rows once there are enough of them; returns the kept indices, or None."""
        alive = self.num_alive = int(self.alive_A.sum())
        if len(self.alive_A) - alive <= _DROP_FINISHED_ABOVE * len(self.alive_A):
            return None
        kept = self.alive_A.nonzero().squeeze(-1)
        self.row_A, self.pads, self.alive_A = self.row_A[kept], self.pads[kept], self.alive_A[kept]
        if alive:
            self.cache.batch_select_indices(kept)
        return kept


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    requests: Sequence[GenerationRequest],
    params: SamplingParams,
    *,
    stop_token_ids: frozenset[int],
    vocab_size: int,
    on_finished: Callable[[int], None] = lambda _: None,
) -> list[Continuation]:
    """Write every request to its stop token or its ``max_new_tokens`` (at least 1 each).

    ``on_finished`` is told after every token how many requests are finished.

    Raises:
        ValueError: the model gives NaN or infinite logits.
    """
    device = model.device
    num_new = max(request.max_new_tokens for request in requests)
    budget_B = torch.tensor([request.max_new_tokens for request in requests], device=device)
    stop = torch.tensor(sorted(stop_token_ids), dtype=torch.int64, device=device)
    uniforms_BN = _uniforms(requests, params, num_new).to(device)
    tokens_BN = torch.zeros(len(requests), num_new, dtype=torch.int64, device=device)
    logprobs_BN = torch.zeros(len(requests), num_new, dtype=torch.float64, device=device)
    topk_BNK = torch.zeros(len(requests), num_new, params.report_top_k, dtype=torch.int32, device=device)
    count_B = budget_B.clone()

    batch = _Batch(model, requests, device)
    logits = batch.prefill()
    for step in range(num_new):
        row = batch.row_A
        tokens, logprobs = sample(
            logits, uniforms_BN[row, step], params.temperature, params.top_p, vocab_size=vocab_size
        )
        tokens_BN[row, step], logprobs_BN[row, step] = tokens, logprobs
        if params.report_top_k:
            topk_BNK[row, step] = logits[:, :vocab_size].topk(params.report_top_k, dim=1).indices.int()
        stopped = torch.isin(tokens, stop) & batch.alive_A
        count_B[row[stopped]] = step + 1
        batch.alive_A &= ~stopped & (budget_B[row] > step + 1)
        kept = batch.drop_finished()
        on_finished(len(requests) - batch.num_alive)
        if not batch.alive_A.any():
            break
        logits = batch.advance(tokens if kept is None else tokens[kept], batch.ids.shape[1] + step)
    written = _continuations(tokens_BN, logprobs_BN, count_B, stop_token_ids)
    if not params.report_top_k:
        return written
    ids = topk_BNK.cpu()
    return [replace(one, topk_ids=ids[place, : len(one.token_ids)].clone()) for place, one in enumerate(written)]


def _continuations(
    tokens_BN: Tensor, logprobs_BN: Tensor, count_B: Tensor, stop_token_ids: frozenset[int]
) -> list[Continuation]:
    written = []
    for tokens, logprobs, count in zip(tokens_BN.tolist(), logprobs_BN.tolist(), count_B.tolist(), strict=True):
        finish: Finish = "stop" if tokens[count - 1] in stop_token_ids else "length"
        written.append(Continuation(token_ids=tuple(tokens[:count]), logprobs=tuple(logprobs[:count]), finish=finish))
    return written
