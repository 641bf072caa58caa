"""Functions that build the parts of a method from settings; ``methods.py`` uses them in its rows."""

from __future__ import annotations

from collections.abc import Callable

from megatron_tropd.objectives.base import Objective
from megatron_tropd.objectives.distillation import Distillation
from megatron_tropd.objectives.forward_kl import ForwardKl
from megatron_tropd.objectives.gates import Gate
from megatron_tropd.objectives.guidance import Guidance
from megatron_tropd.objectives.importance import Importance
from megatron_tropd.objectives.labels import Rule
from megatron_tropd.objectives.settings import (
    Correction,
    FklGrad,
    FklSupport,
    GateKind,
    GuidanceGrad,
    ObjectiveSettings,
    pick,
)
from megatron_tropd.objectives.trust_region import Rejected, TrustRegion

Maker = Callable[[ObjectiveSettings], Objective]


def rule(
    make: Callable[[ObjectiveSettings], Rule], *, guidance_grad: GuidanceGrad = "nll", correction: Correction = "off",
    clip_high: float | None = None,
) -> Maker:  # fmt: skip
    """The maker of a rule's objective; the keywords are the values that ``auto`` stands for."""

    def objective(s: ObjectiveSettings) -> Objective:
        # Older weights wrote what is trained on: without a weight the policy gradient would be theirs.
        own: Correction = "tis" if s.rollout_lag and correction == "off" else correction
        return Distillation(
            rule=make(s),
            importance=Importance(
                correction=pick(s.importance_correction, own),
                tis_cap=s.tis_cap,
                icepop_low=s.icepop_low,
                icepop_high=s.icepop_high,
                sequence_error_max=s.sequence_error_max,
                clip_low=s.ppo_clip,
                clip_high=s.ppo_clip_high or clip_high or s.ppo_clip,
                num_minibatches=s.num_minibatches,
            ),
            guidance=Guidance(beta=s.guidance_beta, grad=pick(s.guidance_grad, guidance_grad)),
            reward_logprob=s.reward_logprob,
            outlier_threshold=s.outlier_threshold,
            topk_share=s.topk_share,
            log_teacher_entropy=s.log_teacher_entropy,
        )

    return objective


def on_data(make: Callable[[ObjectiveSettings], Rule]) -> Maker:
    """The maker of a rule's objective on the responses of the data: no engine wrote them, so there is no importance
    weight and no prefix."""
    return lambda s: Distillation(
        rule=make(s), outlier_threshold=s.outlier_threshold, log_teacher_entropy=s.log_teacher_entropy
    )


def topk_margin(s: ObjectiveSettings) -> float | None:
    """The margin of ``Gate.topk_use``; None where every token's top-k is needed.

    Where the gate reads the engine's own log-probability the decision is known exactly.  With --rollout-lag the gate
    reads newer weights than those that wrote, which no margin for rounding covers.
    """
    if not s.topk_margin:
        return None
    if s.reward_logprob == "rollout":
        return 0.0
    return None if s.rollout_lag else s.topk_margin


def forward_kl(s: ObjectiveSettings, support: FklSupport = "raw", *, logprob_min: float = 0.0) -> ForwardKl:
    """The top-k forward KL; ``support`` and ``logprob_min`` are the method's own values."""
    return ForwardKl(
        top_k=s.top_k,
        support=pick(s.fkl_support, support),
        clamp_zero=s.fkl_clamp_zero,
        logprob_min=s.fkl_logprob_min or logprob_min,
        maximum=s.fkl_max,
    )


def trust_region(
    s: ObjectiveSettings, gate: GateKind, rejected: Rejected, *, support: FklSupport = "raw",
    grad: FklGrad = "direct", logprob_min: float = 0.0, tau: float | None = None,
) -> TrustRegion:  # fmt: skip
    """The rule of a gate and a treatment of rejected tokens; ``tau``, where given, replaces --outlier-threshold."""
    tau = s.outlier_threshold if tau is None else tau
    return TrustRegion(
        gate=Gate(kind=gate, threshold=tau, margin=s.gate_margin),
        rejected=rejected,
        tau=tau,
        forward_kl=forward_kl(s, support, logprob_min=logprob_min) if rejected == "forward_kl" else None,
        grad=pick(s.fkl_grad, grad),
        coef=s.outlier_coef,
        topk_margin=topk_margin(s),
    )
