"""Requests and responses of SGLang's /generate: builds bodies, and checks and reads each response.  Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tropd.rollout.engine import SamplingParams
from megatron_tropd.rollout.sglang.errors import BadResponse, StaleWeights
from megatron_tropd.types import Finish, GenerationRequest, Rollout

_NEVER = -1e9
"""Added to the logits of ids that may not be written; exp() of it is 0 in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptGroup:
    """Requests that differ in the sample index only: one call, whose samples share the prefix cache."""

    indices: tuple[int, ...]
    """Indices of the requests in the batch."""
    token_ids: tuple[int, ...]
    max_new_tokens: int
    prompt_uid: int

    @property
    def tokens(self) -> int:
        """An upper bound of what the server will hold for it."""
        return len(self.token_ids) + len(self.indices) * self.max_new_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """Token limits that are the same for every request of a run."""

    stop_token_ids: frozenset[int]
    vocab_size: int
    """Ids below it may be written (the vocabulary shared with the teacher)."""
    model_vocab_size: int
    """Rows of the model; those beyond ``vocab_size`` are banned by a logit bias."""


def group_requests(requests: Sequence[GenerationRequest]) -> list[PromptGroup]:
    """Group the requests by prompt; the longest come first, so that the last to finish is short."""
    members: dict[tuple[int, tuple[int, ...], int], list[int]] = {}
    for index, request in enumerate(requests):
        if request.max_new_tokens > 0:
            members.setdefault((request.prompt_uid, request.token_ids, request.max_new_tokens), []).append(index)
    groups = [
        PromptGroup(indices=tuple(indices), prompt_uid=uid, token_ids=token_ids, max_new_tokens=max_new)
        for (uid, token_ids, max_new), indices in members.items()
    ]
    return sorted(groups, key=lambda group: -group.max_new_tokens)


def generate_body(group: PromptGroup, params: SamplingParams, rules: TokenRules) -> dict[str, Any]:
    """Body of one /generate call.  Temperature 0 is greedy; SGLang then reports log-probabilities at 1."""
    sampling: dict[str, Any] = {
        "n": len(group.indices),
        "max_new_tokens": group.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "stop_token_ids": sorted(rules.stop_token_ids),
    }
    if rules.vocab_size < rules.model_vocab_size:
        banned = range(rules.vocab_size, rules.model_vocab_size)
        sampling["logit_bias"] = {str(token): _NEVER for token in banned}
    return {"input_ids": list(group.token_ids), "sampling_params": sampling, "return_logprob": True}


def score_body(token_ids: Sequence[int]) -> dict[str, Any]:
    """Body of a /generate call that writes nothing and scores every given token."""
    return {
        "input_ids": list(token_ids),
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }


def _field(value: Any, *path: str) -> Any:
    for name in path:
        if not isinstance(value, dict) or name not in value:
            raise BadResponse(f"the answer has no {'.'.join(path)}")
        value = value[name]
    return value


def _check_version(meta: Any, version: int) -> None:
    """A sample written across an update lists several versions in its spans."""
    versions = {str(_field(meta, "weight_version"))}
    spans = meta.get("weight_versions") or []
    if not isinstance(spans, list):
        raise BadResponse(f"weight_versions is {spans!r}; expected a list")
    versions |= {str(_field(span, "version")) for span in spans}
    if versions != {str(version)}:
        raise StaleWeights(f"written by weight version {', '.join(sorted(versions))}; the trainer pushed {version}")


def _logprobs(entries: Any, token_ids: Sequence[int], what: str, called: Sequence[int]) -> tuple[float, ...]:
    """The log-probability of each token, from SGLang's (log-probability, id, text) triples.

    ``called`` has the ids that the server reports for the tokens.
    """
    if not isinstance(entries, list) or len(entries) != len(token_ids):
        given = len(entries) if isinstance(entries, list) else "no"
        raise BadResponse(f"{given} log-probabilities for {len(token_ids)} {what} tokens")
    values = []
    for entry, token, name in zip(entries, token_ids, called, strict=True):
        if not isinstance(entry, list | tuple) or len(entry) < 2 or entry[1] != name:
            raise BadResponse(f"log-probability entry {entry!r} does not belong to {what} token {token}")
        value = entry[0]
        if not isinstance(value, float | int) or not math.isfinite(value):
            raise BadResponse(f"the log-probability of {what} token {token} is {value!r}")
        values.append(float(value))
    return tuple(values)


def _finish(meta: dict[str, Any], written: Sequence[int], max_new_tokens: int, stop: frozenset[int]) -> Finish:
    kind = _field(meta, "finish_reason", "type")
    if kind == "stop" and written and written[-1] in stop:
        return "stop"
    if kind == "length" and len(written) == max_new_tokens:
        return "length"
    raise BadResponse(
        f"finished by {meta['finish_reason']!r} after {len(written)} of {max_new_tokens} tokens; expected a stop "
        f"token of {sorted(stop)} at the end, or the full length"
    )


def _sample(answer: Any, group: PromptGroup, request: GenerationRequest, version: int, rules: TokenRules) -> Rollout:
    meta, written = _field(answer, "meta_info"), _field(answer, "output_ids")
    _check_version(meta, version)
    if not isinstance(written, list) or not written or len(written) > group.max_new_tokens:
        raise BadResponse(f"wrote {written!r}; expected 1 to {group.max_new_tokens} token ids")
    for token in written:
        if not isinstance(token, int) or not 0 <= token < rules.vocab_size:
            raise BadResponse(f"wrote token id {token!r} outside [0, {rules.vocab_size})")
    return Rollout(
        prompt_uid=request.prompt_uid,
        sample_index=request.sample_index,
        token_ids=request.token_ids + tuple(written),
        prompt_len=request.prompt_len,
        guidance_len=request.guidance_len,
        logprobs=_logprobs(_field(meta, "output_token_logprobs"), written, "written", written),
        weight_version=(version, version),
        finish=_finish(meta, written, group.max_new_tokens, rules.stop_token_ids),
    )


def read_samples(
    body: Any, group: PromptGroup, requests: Sequence[GenerationRequest], *, version: int, rules: TokenRules
) -> dict[int, Rollout]:
    """Return the group's rollouts by their index in the batch.

    Raises:
        StaleWeights: a token was written with other weights than ``version``.
        BadResponse: the response is not a valid rollout in any other way.
    """
    answers = body if isinstance(body, list) else [body]
    if len(answers) != len(group.indices):
        raise BadResponse(f"{len(answers)} samples; expected {len(group.indices)}")
    return {
        index: _sample(answer, group, requests[index], version, rules)
        for index, answer in zip(group.indices, answers, strict=True)
    }


def read_scores(body: Any, token_ids: Sequence[int], *, version: int, rules: TokenRules) -> tuple[float, ...]:
    """Log-probability of every token but the first, given those before it.

    Raises:
        StaleWeights, BadResponse: as :func:`read_samples`.
    """
    meta = _field(body, "meta_info")
    _check_version(meta, version)
    entries, rest = _field(meta, "input_token_logprobs"), token_ids[1:]
    # SGLang scores the model's last id as it should, but reports it as id 0.
    called = [0 if token == rules.model_vocab_size - 1 else token for token in rest]
    return _logprobs(entries[1:] if isinstance(entries, list) else entries, rest, "given", called)
