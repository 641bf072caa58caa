"""Requests and responses of SGLang's /generate: builds bodies, and checks and reads each response.  Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.json_files import shown
from megatron_tropd.rollout.engine import SamplingParams
from megatron_tropd.sglang.api.fields import field, items, text
from megatron_tropd.sglang.api.scores import check_prompt, check_top, read_given, read_logprobs, read_nested
from megatron_tropd.sglang.errors import BadResponse, StaleWeights
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


def generate_body(
    group: PromptGroup, params: SamplingParams, rules: TokenRules, *, logprobs: bool = True
) -> dict[str, Any]:
    """Body of one /generate call, with the log-probabilities of written tokens in its answer or without.

    Temperature 0 is greedy; SGLang then reports log-probabilities at 1.
    """
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
    body: dict[str, Any] = {
        "input_ids": list(group.token_ids), "sampling_params": sampling, "return_logprob": logprobs,
        "return_prompt_token_ids": True,
    }  # fmt: skip
    if params.report_top_k:
        body["top_logprobs_num"] = params.report_top_k
    return body


def weight_name(version: int, run_name: str) -> str:
    """Return the weight version that a server is told.  Versions count steps, so other runs have the same ones."""
    return f"{version}-{run_name}" if run_name else str(version)


def stale_reason(found: Collection[str], expected: str) -> str:
    """Return what is wrong with a server that has the weight versions ``found``."""
    names = ", ".join(shown(name) for name in sorted(found)[:8])
    run = expected.partition("-")[2]
    others = run and any(name.partition("-")[2] not in ("", run) for name in found)
    hint = ": another run pushes weights to this server; give each run its own (--rollout-engine-urls)"
    return f"weight version {names}; the trainer pushed {expected}{hint if others else ''}"


def _check_version(meta: Any, expected: str) -> None:
    """A sample written across an update lists several versions in its spans."""
    versions = {text(field(meta, "weight_version"), "weight_version")}
    spans = meta.get("weight_versions")  # None, or absent: servers that do not write across updates
    for span in items([] if spans is None else spans, "weight_versions"):
        versions.add(text(field(span, "version"), "weight_versions.version"))
    if versions != {expected}:
        raise StaleWeights(f"written by {stale_reason(versions, expected)}")


def _finish(meta: dict[str, Any], written: Sequence[int], max_new_tokens: int, stop: frozenset[int]) -> Finish:
    kind = field(meta, "finish_reason", "type")
    if stop.isdisjoint(written[:-1]):
        if kind == "stop" and written[-1] in stop:
            return "stop"
        if kind == "length" and len(written) == max_new_tokens:
            return "length"
    raise BadResponse(
        f"finished by {shown(meta['finish_reason'])} after {len(written)} of {max_new_tokens} tokens; expected a stop "
        f"token of {sorted(stop)} at the end and nowhere else, or the full length"
    )


def _written(value: Any, group: PromptGroup, rules: TokenRules) -> list[int]:
    if not isinstance(value, list) or not 1 <= len(value) <= group.max_new_tokens:
        raise BadResponse(f"wrote {shown(value)}; expected 1 to {group.max_new_tokens} token ids")
    for token in value:
        if type(token) is not int or not 0 <= token < rules.vocab_size:
            raise BadResponse(f"wrote token id {shown(token)} outside [0, {rules.vocab_size})")
    return value


def read_written(answer: Any, group: PromptGroup, rules: TokenRules) -> tuple[list[int], Finish]:
    """Return the written tokens of one sample, and how it finished.

    Raises:
        BadResponse: they do not fit what was asked.
    """
    written = _written(field(answer, "output_ids"), group, rules)
    return written, _finish(field(answer, "meta_info"), written, group.max_new_tokens, rules.stop_token_ids)


def read_answers(body: Any, group: PromptGroup) -> list[Any]:
    """Return the answer of each sample of the group.

    Raises:
        BadResponse: there are more or fewer, one is there twice, or one is of another prompt.
    """
    answers = body if isinstance(body, list) else [body]
    if len(answers) != len(group.indices):
        raise BadResponse(f"{len(answers)} samples; expected {len(group.indices)}")
    seen = set[str]()
    for answer in answers:
        check_prompt(answer, group.token_ids)
        if "id" in (meta := field(answer, "meta_info")):
            name = text(meta["id"], "id")
            if name in seen:
                raise BadResponse(f"sample {shown(name)} is there twice")
            seen.add(name)
    return answers


def _sample(
    answer: Any, group: PromptGroup, request: GenerationRequest, version: int, name: str, rules: TokenRules,
    report_top_k: int,
) -> Rollout:  # fmt: skip
    meta = field(answer, "meta_info")
    _check_version(meta, name)
    written, finish = read_written(answer, group, rules)
    return Rollout(
        prompt_uid=request.prompt_uid,
        sample_index=request.sample_index,
        token_ids=request.token_ids + tuple(written),
        prompt_len=request.prompt_len,
        guidance_len=request.guidance_len,
        logprobs=read_logprobs(field(meta, "output_token_logprobs"), written, "written", written),
        weight_version=(version, version),
        finish=finish,
        topk_ids=_top_ids(meta, len(written), report_top_k, rules) if report_top_k else None,
    )


def _top_ids(meta: Any, num_written: int, top_k: int, rules: TokenRules) -> Tensor:
    """Return the most probable ids where each written token stands, int32 [W, K]."""
    rows = items(field(meta, "output_top_logprobs"), "output_top_logprobs")
    ids, values = read_nested(rows, num_written, top_k)
    check_top(ids, values, rules.vocab_size)
    return torch.from_numpy(ids)


def read_samples(
    body: Any,
    group: PromptGroup,
    requests: Sequence[GenerationRequest],
    *,
    version: int,
    rules: TokenRules,
    run_name: str = "",
    report_top_k: int = 0,
) -> dict[int, Rollout]:
    """Return the group's rollouts by their index in the batch; ``report_top_k`` is that of the request, ``run_name``
    that of the push.

    Raises:
        StaleWeights: a token was written with other weights than ``version``.
        BadResponse: the response is not a valid rollout in any other way.
    """
    name = weight_name(version, run_name)
    return {
        index: _sample(answer, group, requests[index], version, name, rules, report_top_k)
        for index, answer in zip(group.indices, read_answers(body, group), strict=True)
    }


def read_scores(
    body: Any, token_ids: Sequence[int], *, version: int, rules: TokenRules, run_name: str = ""
) -> tuple[float, ...]:
    """Log-probability of every token but the first, given those before it.

    Raises:
        StaleWeights, BadResponse: as :func:`read_samples`.
    """
    meta = field(body, "meta_info")
    _check_version(meta, weight_name(version, run_name))
    return read_given(body, token_ids, start=0, num_rows=rules.model_vocab_size)
