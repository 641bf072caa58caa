"""Every objective once more, token by token in float64 from whole rows of logits, by its printed definition.

Shares no code with ``megatron_tropd/objectives``: probabilities instead of log-space tricks, Python numbers for what
is detached, autograd for the rest.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from megatron_tropd.types import Region, StepContext

DEFAULTS = {
    "gate": "bernoulli", "gate_margin": 0.0, "outlier_threshold": -1.72, "outlier_coef": 1.0, "fkl_support": "raw",
    "fkl_grad": "direct", "fkl_clamp_zero": False, "fkl_logprob_min": 0.0, "fkl_max": 0.0, "reward_logprob": "trainer",
    "reward_floor": -2.0, "guidance_beta": 0.001, "guidance_grad": "nll", "jsd_beta": 0.5, "entropy_share": 0.2,
    "entropy_denominator": "all", "teacher_entropy_threshold": 0.8, "reopold_bound": "jensen", "reopold_lambda": 0.3,
    "reopold_switch": 0.5, "rkl_support": "tail", "tropd_aopd_reading": "add_pg_on_positive", "tropd_aopd_coef": 1.0, "gopd_lambda": 1.25,
    "topd_alpha": 0.2, "importance_correction": "off", "tis_cap": 2.0, "icepop_low": 0.5, "icepop_high": 5.0,
    "sequence_error_max": 2.0, "ppo_clip": 0.2, "ppo_clip_high": 0.2, "grpo_denominator": "samples", "grpo_kl_coef": 0.0,
}  # fmt: skip
OWN = {
    "fkl_reward": {"fkl_grad": "reward"}, "jsd_reward": {"fkl_grad": "reward"}, "eopd": {"fkl_support": "renorm"},
    "clip_outlier": {"gate": "threshold"}, "mask_outlier": {"gate": "threshold"}, "reopold": {"gate": "threshold"},
    "tropd_mask": {"gate": "threshold"}, "tropd_clip": {"gate": "threshold"}, "aopd": {"gate": "probability"},
    "tropd_official": {"fkl_support": "renorm", "fkl_grad": "reward", "fkl_logprob_min": -10.0,
                       "guidance_grad": "logratio_reward"},
    "tropd_plus": {"gate": "expected", "fkl_support": "tail"}, "tropd_floor": {"fkl_support": "tail"},
    "grpo": {"importance_correction": "icepop", "ppo_clip_high": 0.28},
}  # fmt: skip


def oracle(method, logits, teacher, tokens, context=None, **given):
    """(losses of all labels [T] float64 with gradient, denominator)."""
    s = SimpleNamespace(**{**DEFAULTS, **OWN.get(method, {}), **given})
    context = context or StepContext()
    losses, denominator = [], 0
    rows = zip(logits.double().unbind(), teacher.double().unbind(), strict=True)  # unbind: one backward for all rows
    for t, (student_row, teacher_row) in enumerate(rows):
        row = _Row(student_row, teacher_row, tokens, t, s)
        loss, counted = logits.new_zeros((), dtype=torch.float64), 0
        if row.region == Region.GUIDANCE and method == "kd":
            counted = 1
        elif row.region == Region.GUIDANCE:
            loss, counted = _prefix_token(method, row, s), 1
        elif row.region == Region.ON_POLICY and method != "sft":
            loss, counted = _written_token(method, row, s, context)
        elif row.region == Region.ON_POLICY:
            counted = 1
        losses.append(loss + 0.0 * row.lp)
        denominator += counted
    return torch.stack(losses), denominator


class _Row:
    """One label: tensors carry the student's gradient, floats are detached."""

    def __init__(self, z, y, tokens, t, s):
        x = int(tokens.label_T[t])
        self.region = int(tokens.region_T[t])
        log_p = z.log_softmax(-1)
        self.p, self.q = log_p.exp(), y.softmax(-1)
        self.lp, self.u = log_p[x], float(tokens.uniform_T[t])
        self.old = None if tokens.old_logprob_T is None else float(tokens.old_logprob_T[t])
        before = float(self.lp.detach()) if self.old is None else self.old
        self.mu = float(tokens.rollout_logprob_T[t])
        self.behaviour = self.mu if s.reward_logprob == "rollout" else before
        self.k = math.exp(min(max(before - self.mu, -20.0), 20.0))
        self.lq = float(tokens.teacher_logprob_T[t])
        self.reward = self.lq - self.behaviour
        self.v_lq, self.v_lp = None, None
        if tokens.teacher_topk_ids_TK is not None:
            present = tokens.teacher_topk_logprob_TK[t] > -math.inf
            self.v_lq = tokens.teacher_topk_logprob_TK[t][present].double()
            self.v_lp = log_p[tokens.teacher_topk_ids_TK[t]]
            self.v_present = present
        self.tokens, self.t = tokens, t
        entropy = float(torch.special.entr(self.p.detach()).sum())
        self.entropy = entropy if tokens.old_entropy_T is None else float(tokens.old_entropy_T[t])

    def stream(self, name):
        return float(getattr(self.tokens, name)[self.t])


def _pg(a, row, s):
    """min(r A w, clip(r) A w) with the minus of a loss; a token the teacher excludes has A = 0."""
    if a == -math.inf:
        a = 0.0
    kind = s.importance_correction
    weight = {"off": 1.0, "tis": min(row.k, s.tis_cap)}.get(kind, row.k)
    if kind == "icepop" and not s.icepop_low <= row.k <= s.icepop_high:
        weight = 0.0
    if kind == "seq_err" and row.stream("sequence_error_T") > s.sequence_error_max:
        weight = 0.0
    gain = a * weight
    if row.old is None:
        return -gain * (1 + row.lp - row.lp.detach())
    r = (row.lp - row.old).clamp(max=20.0).exp()
    low, high = 1 - s.ppo_clip, 1 + s.ppo_clip_high
    if (gain > 0 and r > high) or (gain < 0 and r < low):
        return -gain * r.detach().clamp(low, high)
    return -gain * r


def _fkl(row, s):
    if not len(row.v_lq):
        return 0.0 * row.lp
    lq, lp = row.v_lq, row.v_lp[row.v_present]
    q = lq.exp()
    if s.fkl_support in ("renorm", "renorm_both"):
        q = q / q.sum()
        lq = q.log()
    if s.fkl_support == "renorm_both":
        lp = lp - row.v_lp.logsumexp(0)
    if s.fkl_logprob_min:
        lq = torch.tensor([max(float(v), s.fkl_logprob_min) for v in lq], dtype=torch.float64)
        lp = torch.stack([v if v > s.fkl_logprob_min else v.new_tensor(s.fkl_logprob_min) for v in lp])
    value = (q * lq).sum() - (q * lp).sum()
    if s.fkl_support == "tail":
        rest, mass = 1 - float(q.sum()), row.v_lp.exp().sum()
        if rest > 0:
            mass = mass if mass < 1 - 1e-6 else torch.tensor(1 - 1e-6, dtype=torch.float64)
            value = value + rest * math.log(rest) - rest * torch.log1p(-mass)
    if s.fkl_clamp_zero and value < 0:
        value = value.detach() * 0
    return value.new_tensor(s.fkl_max) if s.fkl_max and value > s.fkl_max else value


def _weight(row, s, tau):
    ratio = math.exp(min(row.reward, 100.0))
    if ratio == 0.0 and row.reward == -math.inf:
        return 0.0
    return {
        "bernoulli": float(row.u < min(ratio, 1.0)),
        "expected": min(ratio, 1.0),
        "threshold": float(row.reward > tau),
        "probability": float(math.exp(row.lq) - math.exp(row.behaviour) > s.gate_margin),
        "none": 1.0,
    }[s.gate]


def _gated(rejected, row, s, tau=None):
    tau = s.outlier_threshold if tau is None else tau
    w = _weight(row, s, tau)
    trusted = w * row.reward if w else 0.0
    if rejected == "mask":
        return _pg(trusted, row, s)
    if rejected == "clip":
        return _pg(trusted + (1 - w) * tau, row, s)
    other = s.outlier_coef * (1 - w) * _fkl(row, s)
    if s.fkl_grad == "reward":
        return _pg(trusted - float(other.detach()), row, s)
    return _pg(trusted, row, s) + other


def _jsd(row, s):
    b = s.jsd_beta
    q = row.v_lq.exp()
    m = b * q + (1 - b) * row.v_lp[row.v_present].exp()
    first = b * (q * (row.v_lq - m.log())).sum()
    # log(m / p) = log(b q / p + 1 - b)
    second = -(1 - b) * math.log(b * math.exp(min(row.reward, 600.0)) + 1 - b)
    if s.fkl_grad == "reward":
        return _pg(-float(first.detach()) - second, row, s)
    return first + _pg(-second, row, s)


def _divergence(kind, row, beta=0.5):
    p, q = row.p, row.q
    m = beta * q + (1 - beta) * p
    kl = lambda a, b: (a * (a.log() - b.log())).sum()  # noqa: E731
    return {
        "full_fkl": lambda: kl(q, p), "full_rkl": lambda: kl(p, q),
        "gkd_jsd": lambda: beta * kl(q, m) + (1 - beta) * kl(p, m),
    }[kind]()  # fmt: skip


def _own_rkl(row, s):
    if not len(row.v_lq):
        return 0.0 * row.lp
    p, q = row.v_lp[row.v_present].exp(), row.v_lq.exp()
    if s.rkl_support == "renorm_both":
        p, q = p / p.sum(), q / q.sum()
        return (p * (p.log() - q.log())).sum()
    value = (p * (p.log() - q.log())).sum()
    if s.rkl_support == "raw":
        return value
    most = torch.tensor(1 - 1e-4, dtype=torch.float64)
    rest_p, rest_q = (1 - (mass.sum() if mass.sum() < most else most) for mass in (p, q))
    return value + rest_p * (rest_p.log() - rest_q.log())


def _bound(s):
    lam = s.reopold_lambda
    return math.log(lam) / (1 - lam) if s.reopold_bound == "jensen" else math.log(lam / (1 - lam))


def _written_token(method, row, s, context):
    """(loss, what it adds to the denominator)."""
    reward, high_entropy = row.reward, lambda: row.entropy >= context.entropy_threshold
    if method == "entropy_opd":
        kept = high_entropy()
        return _pg(reward if kept else 0.0, row, s), 1 if s.entropy_denominator == "all" else int(kept)
    if method == "reopold_two_stage":
        kept = reward >= _bound(s) if context.step < s.reopold_switch * context.num_steps else high_entropy()
        return _pg(max(reward, _bound(s)) if kept else 0.0, row, s), int(kept)
    if method == "grpo":
        return _grpo(row, s)
    table = {
        "opd": lambda: _pg(reward, row, s),
        "fkl": lambda: _fkl(row, s) if s.fkl_grad == "direct" else _pg(-float(_fkl(row, s).detach()), row, s),
        "jsd": lambda: _jsd(row, s),
        "eopd": lambda: _pg(reward, row, s)
        + (s.outlier_coef * _fkl(row, s) if row.stream("teacher_entropy_T") > s.teacher_entropy_threshold else 0.0),
        "clip_outlier": lambda: _gated("clip", row, s),
        "mask_outlier": lambda: _gated("mask", row, s),
        "reopold": lambda: _gated("clip", row, s, tau=_bound(s)),
        "tropd": lambda: _gated("fkl", row, s),
        "tropd_aopd": lambda: _tropd_aopd(row, s),
        "tropd_floor": lambda: _pg(max(reward, s.reward_floor), row, s)
        + (1 - min(1.0, math.exp(min(reward, 0.0)))) * s.outlier_coef * _fkl(row, s),
        "clip_fkl": lambda: _pg(max(reward, s.reward_floor), row, s) + s.outlier_coef * _fkl(row, s),
        "gopd": lambda: _pg(
            s.gopd_lambda * (row.lq - row.stream("reference_logprob_T"))
            - (row.behaviour - row.stream("reference_logprob_T")), row, s),
        "topd": lambda: _pg(math.log(s.topd_alpha * math.exp(min(reward, 600.0)) + 1 - s.topd_alpha), row, s),
        "vopd": lambda: _pg(reward + float(_divergence("full_rkl", row).detach()), row, s),
        "full_fkl": lambda: _divergence("full_fkl", row),
        "full_rkl": lambda: _divergence("full_rkl", row),
        "gkd_jsd": lambda: _divergence("gkd_jsd", row, s.jsd_beta),
        "topk_rkl": lambda: _own_rkl(row, s),
    }  # fmt: skip
    same = {
        "fkl_reward": "fkl", "kd": "fkl", "jsd_reward": "jsd", "fkl_outlier": "tropd", "aopd": "tropd", "tropd_paper": "tropd",
        "tropd_official": "tropd", "tropd_plus": "tropd", "tropd_mask": "mask_outlier", "tropd_clip": "clip_outlier",
    }  # fmt: skip
    return table[same.get(method, method)](), 1


def _tropd_aopd(row, s):
    if s.tropd_aopd_reading == "add_pg_on_positive":
        return _gated("fkl", row, s) + (s.tropd_aopd_coef * _pg(row.reward, row, s) if row.reward > 0 else 0.0)
    w = _weight(row, s, s.outlier_threshold)
    loss = _pg(w * row.reward if w else 0.0, row, s)
    return loss if row.reward > 0 else loss + s.tropd_aopd_coef * _fkl(row, s)


def _grpo(row, s):
    loss = _pg(row.stream("advantage_T"), row, s)
    if s.grpo_kl_coef:
        gap = row.stream("reference_logprob_T") - row.lp
        loss = loss + s.grpo_kl_coef * (gap.exp() - 1 - gap)
    if s.grpo_denominator == "tokens":
        return loss, 1
    return loss / row.stream("written_len_T"), int(row.stream("sample_start_T"))


def _prefix_token(method, row, s):
    if method == "sft":
        return -row.lp
    if method == "grpo":
        return 0.0 * row.lp
    lq = row.lq if row.lq > -math.inf else 0.0
    if s.guidance_grad == "nll":
        return s.guidance_beta * (lq - row.lp)
    plain = SimpleNamespace(**{**vars(s), "importance_correction": "off", "ppo_clip_high": 0.2, "ppo_clip": 0.2})
    return _pg(s.guidance_beta * (float(row.lp.detach()) - lq), row, plain)
