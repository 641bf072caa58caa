"""Which tokens' loss may read the teacher's top-k, known where the teacher scores: before the trainer's forward pass.

A gate compares R = log q(x) - log p(x) with a coin or a limit.  The teacher knows log q(x) and the coin, and the
rollout brings the engine's log p(x), which differs from the trainer's by rounding.  A token whose R is inside the trust
region even if it were smaller by the margin is certain to be accepted: its loss does not read the top-k.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_tropd import rng
from megatron_tropd.types import Needs, Rollout, ScoreRequest, TeacherScores, TokenStreams, TopkUse


def request_of(needs: Needs, *, seed: int, step: int) -> ScoreRequest:
    """What the teacher has to compute for the batch of ``step``, with the coins of that step."""
    use = needs.topk_use
    return replace(needs.score, topk_use=replace(use, seed=seed, step=step) if use else None)


def may_use_topk(use: TopkUse, scores: TeacherScores, rollout: Rollout) -> Tensor:
    """Boolean [W], False for a token that is certain not to need its top-k; True for all of a measured sample."""
    uid = torch.tensor([rng.sample_uid(rollout.prompt_uid, rollout.sample_index)])
    if bool(measured(uid, use.share, use.step)):
        return torch.ones(len(rollout.logprobs), dtype=torch.bool)
    if use.kind == "teacher_entropy":
        if scores.entropy is None:
            raise ValueError("the top-k is for tokens of high teacher entropy, which was not asked for")
        return scores.entropy > use.limit
    teacher_W = scores.logprob[rollout.guidance_len :]
    engine_W = torch.tensor(rollout.logprobs, dtype=torch.float32)
    lowest_W = teacher_W - engine_W - use.margin
    if use.kind == "bernoulli":
        first = rollout.prompt_len + rollout.guidance_len
        coins = rng.key(use.seed, rng.Stream.GATE, use.step)
        certain_W = rng.uniform(coins, uid, torch.arange(first, len(rollout.token_ids))).log() < lowest_W.double()
    elif use.kind == "probability":
        certain_W = teacher_W.exp() - (engine_W + use.margin).exp() > use.limit
    else:
        certain_W = lowest_W > use.limit
    return ~(certain_W & (teacher_W > -torch.inf))


def measured(sample_uid_T: Tensor, share: float, step: int) -> Tensor:
    """Boolean [T], true for labels of the samples, a share of all, whose top-k comes whole: metrics of it are means
    over them.  A function of sample and step alone."""
    key = rng.key(0, rng.Stream.MEASURED, step)
    return rng.uniform(key, sample_uid_T, torch.zeros_like(sample_uid_T)) < share


def has_topk(tokens: TokenStreams) -> Tensor:
    """Boolean [T], true where the teacher sent a top-k."""
    assert tokens.teacher_topk_logprob_TK is not None
    return (tokens.teacher_topk_logprob_TK > -torch.inf).any(-1)
