"""The metrics that every method reports about its labels, under the same names: means, kept as sums and counts.

A method without a gate reports trust by the paper's gate: min(1, q(x) / p(x)), whose mean over x ~ p is 1 - TV(p, q).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tropd.objectives.forward_kl import ForwardKl
from megatron_tropd.objectives.gates import expected_acceptance
from megatron_tropd.objectives.importance import engine_ratio, policy_ratio
from megatron_tropd.objectives.jsd import jsd_halves
from megatron_tropd.objectives.labels import Labels, Term
from megatron_tropd.objectives.topk_use import has_topk, measured
from megatron_tropd.types import Metric, Needs, TopkUse

Entries = dict[str, tuple[Tensor, Tensor]]
"""Name -> (value, weight), both [T]."""


@torch.no_grad()
def label_metrics(labels: Labels, term: Term, needs: Needs, *, tau: float) -> dict[str, Metric]:
    """Every metric that these labels can give; ``needs`` are those of the whole objective."""
    entries: Entries = _student(labels, term)
    if needs.rollouts:
        entries |= _importance(labels)
    if needs.teacher:
        entries |= _teacher(labels, term, tau)
        entries |= _own_topk(labels) if needs.student_top_k else _topk(labels, term, needs.topk_use)
    return _sums(entries)


def _student(labels: Labels, term: Term) -> Entries:
    on_policy_T, stats = labels.regions.on_policy_T, labels.stats
    entries = {"tropd/guidance_nll": (-stats.logprob_T, labels.regions.guidance_T)}
    optional = {
        "student/entropy": stats.entropy_T,
        "tropd/clamped_frac": term.clamped_T,
        "tropd/selected_frac": term.selected_T,
        "tropd/divergence": stats.divergence_T,
    }
    return entries | {name: (value, on_policy_T) for name, value in optional.items() if value is not None}


def _teacher(labels: Labels, term: Term, tau: float) -> Entries:
    on_policy_T, tokens, reward_T = labels.regions.on_policy_T, labels.tokens, labels.reward_T
    finite_T = on_policy_T & (reward_T > -torch.inf)
    trust_T = expected_acceptance(reward_T) if term.trust_T is None else term.trust_T
    entries = {
        "tropd/trusted_frac": (trust_T, on_policy_T),
        "tropd/outlier_frac": (reward_T < tau, on_policy_T),
        "tropd/reward_mean": (reward_T, finite_T),
        "tropd/k1_trusted": (reward_T, finite_T * trust_T),
        "tropd/k1_rejected": (reward_T, finite_T * (1 - trust_T)),
    }
    if tokens.teacher_entropy_T is not None:
        entries["teacher/entropy"] = (tokens.teacher_entropy_T, on_policy_T)
    return entries


def _topk(labels: Labels, term: Term, use: TopkUse | None) -> Entries:
    """Metrics of the teacher's top-k.  Where it comes for some tokens only, these are no sample of all: the metrics are
    then of the samples whose top-k comes whole."""
    stats, tokens, read_T = labels.stats, labels.tokens, labels.regions.on_policy_T
    entries: Entries = {}
    if tokens.teacher_topk_logprob_TK is None or stats.topk_logprob_TK is None:
        return entries
    if use is not None:
        if term.topk_T is not None:
            entries["teacher/topk_missing_frac"] = (term.topk_T & ~has_topk(tokens), read_T)
        read_T = read_T & measured(tokens.sample_uid_T, use.share, labels.context.step)
    if stats.topk_overlap_T is not None:
        entries["tropd/topk_overlap"] = (stats.topk_overlap_T, read_T)
    forward_T = ForwardKl(top_k=tokens.teacher_topk_logprob_TK.shape[-1])(stats, tokens)
    halves = jsd_halves(stats, tokens, labels.reward_T, beta=0.5)
    return entries | {
        "tropd/forward_kl_topk": (forward_T, read_T),
        "tropd/jsd_topk": (halves[0] + halves[1], read_T),
        "tropd/teacher_topk_mass": (tokens.teacher_topk_logprob_TK.exp().sum(-1), read_T),
        "tropd/student_topk_mass": (stats.topk_logprob_TK.exp().sum(-1), read_T),
    }


def _own_topk(labels: Labels) -> Entries:
    """Mass of both models on the student's own top-k."""
    stats, tokens, on_policy_T = labels.stats, labels.tokens, labels.regions.on_policy_T
    if tokens.teacher_topk_logprob_TK is None or stats.topk_logprob_TK is None:
        return {}
    return {
        "tropd/own_topk_mass": (stats.topk_logprob_TK.exp().sum(-1), on_policy_T),
        "tropd/teacher_mass_on_own_topk": (tokens.teacher_topk_logprob_TK.exp().sum(-1), on_policy_T),
    }


def _importance(labels: Labels) -> Entries:
    """Metrics of the importance correction: its effect, or the effect it would have if it were on."""
    on_policy_T, stats, tokens, importance = labels.regions.on_policy_T, labels.stats, labels.tokens, labels.importance
    ratio_T = engine_ratio(stats, tokens)
    entries = {
        "importance/ratio_mean": (ratio_T, on_policy_T),
        "importance/truncated_frac": (ratio_T > importance.tis_cap, on_policy_T),
        "importance/masked_frac": (importance.masked(stats, tokens), on_policy_T),
    }
    if tokens.old_logprob_T is not None:
        policy_T = policy_ratio(stats, tokens)
        outside_T = (policy_T < 1 - importance.clip_low) | (policy_T > 1 + importance.clip_high)
        entries["ppo/ratio_mean"] = (policy_T, on_policy_T)
        entries["ppo/clipped_frac"] = (outside_T, on_policy_T)
    return entries


def _sums(entries: Entries) -> dict[str, Metric]:
    """Sums and counts of all metrics at once: on a GPU, launching one small kernel per name would take longer."""
    weight = torch.stack([weight for _, weight in entries.values()]).double()
    value = torch.stack([value for value, _ in entries.values()]).double()
    totals = (weight * torch.where(weight != 0, value, 0.0)).sum(1)  # a value without weight may be infinite
    counts = weight.sum(1)
    return {name: Metric(total=totals[i], count=counts[i]) for i, name in enumerate(entries)}
