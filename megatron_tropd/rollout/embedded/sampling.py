"""Drawing one token per row from logits and given uniform numbers.  Pure and row-wise: a row's token
is a function of that row's logits and uniform only, not of the rest of the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def nucleus(probs_BV: Tensor, top_p: float) -> Tensor:
    """Mask [B, V] of the smallest set of most probable tokens whose mass reaches ``top_p``.

    The token that crosses the threshold is kept; equal probabilities are taken by ascending id.
    """
    ordered, ids = torch.sort(probs_BV, dim=-1, descending=True, stable=True)
    mass_before = pad(ordered.cumsum(-1)[:, :-1], (1, 0))
    keep = mass_before < top_p
    return torch.zeros_like(keep).scatter_(-1, ids, keep)


def _inverse_cdf(weights_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Smallest id whose cumulative weight exceeds ``uniform * total``; never one of weight 0."""
    cdf = weights_BV.cumsum(-1)
    total = cdf[:, -1]
    # uniform * total may round up to total, beyond the last token.
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniforms_B * total, below_total)
    return torch.searchsorted(cdf, target[:, None], right=True).squeeze(-1)


def sample(
    logits_BV: Tensor, uniforms_B: Tensor, temperature: float, top_p: float, *, vocab_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Draw a token per row: the largest logit at temperature 0 (lowest id on ties), otherwise by
    inverse CDF in float64, in id order, over the softmax or its nucleus.

    Args:
        logits_BV: fp32 logits [B, V].
        uniforms_B: float64 in (0, 1) [B]; not read at temperature 0.
        temperature: >= 0.
        top_p: in (0, 1].
        vocab_size: only the first so many columns exist; None for all.

    Returns:
        ``(token_ids, logprobs)``: int64 [B] and float64 [B].  The log-probability is that of the FULL
        vocabulary, log-softmax of logits / temperature (temperature 1 when greedy): top-p does not
        enter it, so with top_p < 1 it is not the log-probability of the draw.

    Raises:
        ValueError: a row has NaN or infinite logits (its log-probability is not a number).
    """
    logits = logits_BV[:, :vocab_size].double()
    log_probs = torch.log_softmax(logits / temperature if temperature > 0 else logits, dim=-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        probs = log_probs.exp()
        tokens = _inverse_cdf(probs if top_p >= 1 else probs * nucleus(probs, top_p), uniforms_B)
        # NaN rows find no place in the CDF; keep the index legal until they are refused below.
        tokens = tokens.clamp_(max=logits.shape[-1] - 1)
    chosen = log_probs.gather(-1, tokens[:, None]).squeeze(-1)
    if not torch.isfinite(chosen).all():
        row = int((~torch.isfinite(chosen)).nonzero()[0])
        raise ValueError(f"row {row} of the logits has no finite log-probability (NaN or infinite logits)")
    return tokens, chosen
