"""Checks that the token streams hold what an objective needs, before a step uses them."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tropd.objectives.base import Regions
from megatron_tropd.rng import split_sample_uid
from megatron_tropd.types import Needs, TokenStreams

_MAX_LOGPROB = 1e-2
"""Largest accepted log-probability: rounding may lift a log-probability slightly above 0."""


def check_streams(tokens: TokenStreams, needs: Needs) -> None:
    """Check that every stream in ``needs`` is present, aligned with the labels, and valid where a loss reads it.

    -inf from the teacher is allowed: it means that the teacher excludes the token.  Streams on a GPU cost one wait
    for it; the training loop checks them before they go there.

    Raises:
        ValueError: a stream is missing, has a wrong shape, or holds a NaN, an infinity, a log-probability above 0 or
            a repeated top-k id; the message names the stream.
    """
    problems = _missing(tokens, needs) or _misshapen(tokens, needs) or _impossible(tokens, needs)
    if problems:
        raise ValueError("; ".join(problems))


def _missing(tokens: TokenStreams, needs: Needs) -> list[str]:
    told = {
        "teacher_topk_ids_TK": (needs.top_k, f"the teacher's top-{needs.top_k}, and it sent sampled tokens only"),
        "teacher_topk_logprob_TK": (needs.top_k, f"log-probabilities of the teacher's top-{needs.top_k}"),
        "teacher_entropy_T": (needs.teacher_entropy, "the teacher's full-vocabulary entropy"),
        "teacher_hidden_TH": (needs.divergence, "the teacher's hidden states, for a divergence over the vocabulary"),
        "reference_logprob_T": (needs.reference_logprob, "log-probabilities of a reference model"),
        "old_logprob_T": (needs.old_logprob, "the student's log-probabilities before the first update"),
        "advantage_T": (needs.rewards, "group advantages"),
    }  # fmt: skip
    return [
        f"{name} is missing: this objective needs {what}"
        for name, (wanted, what) in told.items()
        if wanted and getattr(tokens, name) is None
    ]


def _misshapen(tokens: TokenStreams, needs: Needs) -> list[str]:
    num_tokens = len(tokens.label_T)
    problems = []
    for name in tokens.__dataclass_fields__:
        value, suffix = getattr(tokens, name), name.rsplit("_", 1)[1]
        if value is None:
            continue
        if value.ndim != len(suffix) or len(value) != num_tokens:
            problems.append(f"{name} has shape {list(value.shape)}, expected {len(suffix)} axes of {num_tokens} labels")
        elif suffix == "TK" and value.shape[1] != needs.top_k:
            problems.append(f"{name} has {value.shape[1]} tokens per label, expected --top-k {needs.top_k}")
    return problems


def _impossible(tokens: TokenStreams, needs: Needs) -> list[str]:
    regions = Regions.of(tokens)
    written_T = regions.on_policy_T
    read_T = written_T | regions.guidance_T
    bad: dict[str, Tensor] = {
        "rollout_logprob_T": written_T & ~_is_logprob(tokens.rollout_logprob_T, finite=True),
    }
    if needs.teacher:
        bad["teacher_logprob_T"] = read_T & ~_is_logprob(tokens.teacher_logprob_T)
    if tokens.teacher_topk_logprob_TK is not None and tokens.teacher_topk_ids_TK is not None:
        bad["teacher_topk_logprob_TK"] = written_T & ~_is_logprob(tokens.teacher_topk_logprob_TK).all(-1)
        bad["teacher_topk_ids_TK (an id twice, or negative)"] = written_T & _bad_ids(
            tokens.teacher_topk_ids_TK, tokens.teacher_topk_logprob_TK > -torch.inf
        )
    for name in ("reference_logprob_T", "old_logprob_T"):
        if (value := getattr(tokens, name)) is not None:
            bad[name] = written_T & ~_is_logprob(value, finite=True)
    for name in ("teacher_entropy_T", "old_entropy_T", "sequence_error_T", "advantage_T"):
        if (value := getattr(tokens, name)) is not None:
            bad[name] = written_T & ~value.isfinite()
    counts = torch.stack([mask.sum() for mask in bad.values()]).tolist()  # the only wait for the device
    return [_complaint(tokens, name, bad[name], count) for name, count in zip(bad, counts, strict=True) if count]


def _is_logprob(value: Tensor, *, finite: bool = False) -> Tensor:
    """False for a NaN, for +inf and for a value clearly above 0; with ``finite`` also for -inf."""
    return (value <= _MAX_LOGPROB) & (value > -torch.inf) if finite else value <= _MAX_LOGPROB


def _bad_ids(ids_TK: Tensor, present_TK: Tensor) -> Tensor:
    """Boolean [T], true where an id with mass is negative or occurs twice (its mass would then count twice)."""
    places = torch.arange(ids_TK.shape[1], device=ids_TK.device)
    distinct = torch.where(present_TK, ids_TK, -1 - places)  # each absent entry gets an id of its own
    ordered = distinct.sort(-1).values
    return (ordered[:, 1:] == ordered[:, :-1]).any(-1) | (present_TK & (ids_TK < 0)).any(-1)


def _complaint(tokens: TokenStreams, name: str, bad_T: Tensor, count: int) -> str:
    first = int(bad_T.nonzero()[0, 0])
    value = getattr(tokens, name.split()[0])[first].tolist()
    prompt_uid, sample_index = split_sample_uid(int(tokens.sample_uid_T[first]))
    shown = value if not isinstance(value, list) else value[:8]
    return (
        f"{name}: {count} of {len(bad_T)} labels cannot be used, the first at position "
        f"{int(tokens.label_position_T[first])} of prompt {prompt_uid}, sample {sample_index}: {shown}; "
        "expected finite numbers, log-probabilities at most 0 (-inf only from a teacher)"
    )
