"""Section e: the embedded engine's speed, and its greedy tokens against transformers' own generation."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel import platform
from megatron_tropd.rollout.embedded.engine import EmbeddedEngine
from megatron_tropd.rollout.engine import SamplingParams
from megatron_tropd.types import GenerationRequest, Rollout

from .device import clocked, peak_gb
from .report import Report
from .setting import Setting
from .shapes import QWEN3_0_6B, TINY, stop_token, write_hf_config
from .weights import hf_tensors

TIE = 1e-3
"""Logits that are as close may change places: the two programs add in other orders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is written."""

    arch: Architecture
    sequences: int
    prompt: int
    new: int
    greedy: int
    """Sequences that are compared with transformers', of uneven prompts."""
    greedy_new: int


REAL = Sizes(arch=QWEN3_0_6B, sequences=64, prompt=128, new=256, greedy=4, greedy_new=48)
SMALL = Sizes(arch=TINY, sequences=4, prompt=8, new=6, greedy=3, greedy_new=6)


def run(report: Report, setting: Setting) -> None:
    """See the module."""
    sizes = SMALL if setting.tiny else REAL
    with tempfile.TemporaryDirectory(prefix="tropd-acceptance-") as folder:
        hf_dir = write_hf_config(sizes.arch, Path(folder))
        with report.attempt("greedy decoding"):
            _check_greedy(report, sizes, hf_dir)
        with report.attempt("speed"):
            _measure(report, sizes, hf_dir, torch.bfloat16 if setting.cuda else torch.float32)


def _engine(sizes: Sizes, hf_dir: Path, dtype: torch.dtype) -> EmbeddedEngine:
    """Return an engine that holds the random checkpoint 0."""
    engine = EmbeddedEngine(
        hf_dir, stop_token_ids=[stop_token(sizes.arch)], dtype=dtype, device=platform.device(),
        max_batch_size=sizes.sequences,
    )  # fmt: skip
    engine.begin_update(0)
    engine.update(hf_tensors(sizes.arch, device=platform.device(), dtype=dtype))
    engine.end_update(0)
    return engine


def _requests(sizes: Sizes, count: int, new: int, uneven: int) -> list[GenerationRequest]:
    generator = torch.Generator().manual_seed(13)
    requests = []
    for index in range(count):
        length = sizes.prompt - uneven * index
        tokens = torch.randint(1, stop_token(sizes.arch), (length,), generator=generator).tolist()
        requests.append(
            GenerationRequest(
                prompt_uid=index, sample_index=0, token_ids=tuple(tokens), prompt_len=length, guidance_len=0,
                max_new_tokens=new,
            )
        )  # fmt: skip
    return requests


def _measure(report: Report, sizes: Sizes, hf_dir: Path, dtype: torch.dtype) -> None:
    engine = _engine(sizes, hf_dir, dtype)
    requests = _requests(sizes, sizes.sequences, sizes.new, 0)
    sampling = SamplingParams(seed=1, step=0)
    engine.generate(_requests(sizes, sizes.sequences, 4, 0), sampling)  # loads kernels
    (rollouts, seconds), peak = peak_gb(lambda: clocked(lambda: engine.generate(requests, sampling)))
    written = sum(len(rollout.logprobs) for rollout in rollouts)
    what = f"{sizes.sequences} sequences, {sizes.prompt} tokens of prompt, up to {sizes.new} new, {dtype}"
    memory = "" if peak is None else f", {peak:.2f} GB at the peak"
    report.measured(
        f"{what}: new tokens per second", written / seconds, form=",.0f",
        reason=f"{written} tokens in {seconds:.2f} s, {seconds / sizes.new * 1e3:.1f} ms a step{memory}",
    )  # fmt: skip
    engine.close()


def _transformers(sizes: Sizes, hf_dir: Path) -> PreTrainedModel:
    """Return transformers' own model with the random checkpoint 0, in fp32."""
    config = AutoConfig.from_pretrained(hf_dir, local_files_only=True)
    with torch.device(platform.device()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    weights = dict(hf_tensors(sizes.arch, device=platform.device(), dtype=torch.float32))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.eval()


def _check_greedy(report: Report, sizes: Sizes, hf_dir: Path) -> None:
    """In fp32: in bf16 equal logits are usual, and which of them comes first depends on the shape of a product."""
    engine = _engine(sizes, hf_dir, torch.float32)
    requests = _requests(sizes, sizes.greedy, sizes.greedy_new, uneven=1)
    rollouts = engine.generate(requests, SamplingParams(seed=1, step=0, temperature=0.0))
    engine.close()
    model = _transformers(sizes, hf_dir)
    reference = _generate(model, requests, sizes)
    equal, excused, problems = 0, 0, []
    for rollout, tokens in zip(rollouts, reference, strict=True):
        place = _first_difference(_written(rollout), tokens)
        if place is None:
            equal += 1
        elif (gap := _gap(model, rollout, place, tokens)) <= TIE:
            excused += 1
        else:
            problems.append(f"prompt {rollout.prompt_uid} differs from new token {place} on, {gap:.1e} apart")
    ties = f"; {excused} part at logits that differ by {TIE:g} or less" if excused else ""
    report.add(
        f"greedy decoding of {len(requests)} uneven prompts, {sizes.greedy_new} new tokens, fp32, against transformers",
        "failed" if problems else "pass", expected="equal tokens", measured=f"{equal} of {len(requests)} equal{ties}",
        reason="; ".join(problems),
    )  # fmt: skip


@torch.no_grad()
def _generate(model: PreTrainedModel, requests: Sequence[GenerationRequest], sizes: Sizes) -> list[list[int]]:
    """Return what transformers writes for each request, in one left-padded batch."""
    longest = max(len(request.token_ids) for request in requests)
    pads = [longest - len(request.token_ids) for request in requests]
    rows = [[0] * pad + list(request.token_ids) for pad, request in zip(pads, requests, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
    written = model.generate(  # type: ignore[operator]  # transformers' mixin
        input_ids=_tensor(rows), attention_mask=_tensor(mask), do_sample=False, max_new_tokens=sizes.greedy_new,
        eos_token_id=stop_token(sizes.arch), pad_token_id=0,
    )  # fmt: skip
    nothing = [-1] * sizes.greedy_new  # where all rows had ended
    return [(row[longest:] + nothing)[: sizes.greedy_new] for row in written.tolist()]


def _tensor(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, device=platform.device())


def _written(rollout: Rollout) -> tuple[int, ...]:
    return rollout.token_ids[rollout.prompt_len :]


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Return the first place at which the tokens differ; after a stop token transformers pads."""
    return next((place for place, token in enumerate(ours) if token != theirs[place]), None)


@torch.no_grad()
def _gap(model: PreTrainedModel, rollout: Rollout, place: int, theirs: Sequence[int]) -> float:
    """Return by how much transformers' logits of both tokens differ at the first difference."""
    given = rollout.token_ids[: rollout.prompt_len + place]
    logits = model(_tensor([list(given)])).logits[0, -1]
    return float((logits[theirs[place]] - logits[_written(rollout)[place]]).abs())
