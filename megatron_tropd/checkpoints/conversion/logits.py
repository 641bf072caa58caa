"""Check a conversion without its code: compare the logits of transformers' model and Megatron's on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.checkpoints.directory import read_metadata
from megatron_tropd.checkpoints.known_logprobs import KnownLogprobs
from megatron_tropd.checkpoints.load import load_checkpoint
from megatron_tropd.checkpoints.metadata import CheckpointError, Iteration
from megatron_tropd.checkpoints.state import load_model_state
from megatron_tropd.data.packing import pack
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.models.build import build_gpt_model, forward_hidden
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.groups import student_groups
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.types import Rollout

NUM_TOKENS = 16
LIMIT = 1e-3
"""Limit of the largest difference, relative to the largest logit or 1.  Other orders of fp32 sums stay far below it."""
KNOWN_SEQUENCES, KNOWN_TOKENS = 4, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsCheck:
    """The result of a comparison that succeeded."""

    text: str
    """One line with the largest difference."""
    known: KnownLogprobs
    """What transformers' model gives sequences that it wrote itself."""


def _tokens(arch: Architecture) -> Tensor:
    count = min(NUM_TOKENS, arch.max_sequence_length)
    return torch.randint(0, arch.vocab_size, (count,), generator=torch.Generator().manual_seed(0))


def _megatron(load: Path, iteration: Iteration, token_T: Tensor) -> Tensor:
    """Return the logits [T, V] by Megatron's own loader and model, in this process alone."""
    metadata = read_metadata(load, iteration)
    arch, divisor = metadata.architecture, metadata.make_vocab_size_divisible_by
    groups = student_groups(ParallelLayout(make_vocab_size_divisible_by=divisor))
    model = build_gpt_model(arch, groups).eval()
    state, _ = load_checkpoint(load, iteration, {"model": model.sharded_state_dict()}, arch=arch)
    load_model_state(model, state["model"])
    sequence = Rollout(
        prompt_uid=0, sample_index=0, token_ids=tuple(token_T.tolist()), prompt_len=len(token_T), guidance_len=0,
        logprobs=(), weight_version=(0, 0), finish="length",
    )  # fmt: skip
    hidden = forward_hidden(model, pack([sequence], None, num_tokens=len(token_T)).to(platform.device()))
    return (hidden[:, 0] @ model.lm_head_weight().t())[:, : arch.vocab_size]


def _known_logprobs(model: Any, arch: Architecture) -> KnownLogprobs:
    """Sample sequences from transformers' ``model``, from random first tokens on, and return what it gives them.

    Sequences that the model itself wrote are contexts like those of its training, where reduced precision has the
    least effect on log-probabilities.
    """
    generator = torch.Generator().manual_seed(0)
    token_BT = torch.randint(0, arch.vocab_size, (KNOWN_SEQUENCES, 1), generator=generator)
    out = model(token_BT, use_cache=True)
    while token_BT.shape[1] < min(KNOWN_TOKENS, arch.max_sequence_length):
        drawn_B1 = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator)
        token_BT = torch.cat([token_BT, drawn_B1], 1)
        out = model(drawn_B1, past_key_values=out.past_key_values, use_cache=True)
    logprob_BTV = model(token_BT).logits[:, :-1].double().log_softmax(-1)
    logprob_BT = logprob_BTV.gather(-1, token_BT[:, 1:, None])[..., 0]
    return KnownLogprobs(
        sequences=tuple(map(tuple, token_BT.tolist())), logprobs=tuple(map(tuple, logprob_BT.tolist()))
    )


@torch.no_grad()
def check_logits(hf: Path, load: Path, iteration: Iteration) -> LogitsCheck:
    """Compare the logits of an HF directory, by transformers, with those of a Megatron checkpoint, in fp32.

    Raises:
        CheckpointError: they differ by more than ``LIMIT``.
    """
    from transformers import AutoModelForCausalLM

    assert dist.get_world_size() == 1
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    arch = read_metadata(load, iteration).architecture
    token_T = _tokens(arch)
    wanted = model(token_T[None]).logits[0]
    known = _known_logprobs(model, arch)
    del model
    found = _megatron(load, iteration, token_T)
    error = (found.cpu() - wanted).abs().max().item()
    limit = LIMIT * max(1.0, wanted.abs().max().item())
    if not error <= limit:
        raise CheckpointError(f"logits of {load} differ from those of {hf} by {error:.2e} (limit {limit:.0e})")
    return LogitsCheck(text=f"logits of {len(token_T)} tokens differ by {error:.1e} at most", known=known)
