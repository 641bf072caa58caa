"""A whole objective from a rule for the student's tokens: adds reward, guidance, denominator and metrics."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_tropd.objectives.base import Regions, student_before
from megatron_tropd.objectives.gates import expected_acceptance
from megatron_tropd.objectives.guidance import Guidance
from megatron_tropd.objectives.importance import Importance
from megatron_tropd.objectives.labels import Labels, Rule
from megatron_tropd.objectives.metrics import label_metrics
from megatron_tropd.objectives.settings import RewardLogprob
from megatron_tropd.types import LossOutput, Needs, StepContext, TokenStats, TokenStreams


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """Sum of the rule's losses on ON_POLICY labels and of the guidance losses on GUIDANCE labels.

    The denominator is the number of both; a rule may count fewer ON_POLICY labels.
    """

    rule: Rule
    importance: Importance = field(default_factory=Importance)
    guidance: Guidance = field(default_factory=Guidance)
    reward_logprob: RewardLogprob = "trainer"
    """Source of log p(x) in the reward: the trainer before the first update, or the rollout engine."""
    outlier_threshold: float = -1.72
    """Used only for the metric ``tropd/outlier_frac``."""
    topk_share: float = 0.0
    """Share of the samples whose top-k comes whole where the rule does not need that of all tokens."""
    log_teacher_entropy: bool = False
    """Ask for the teacher's entropy for its metric where the rule does not need it: a teacher can give it."""

    @property
    def needs(self) -> Needs:
        """The rule's needs, the old log-probabilities where several updates or a correction use them, and what metrics
        ask for."""
        needs = self.rule.needs
        use = needs.topk_use
        return replace(
            needs,
            old_logprob=needs.old_logprob or self.importance.needs_old_logprob,
            topk_use=replace(use, share=self.topk_share) if use else None,
            teacher_entropy=needs.teacher_entropy or (self.log_teacher_entropy and needs.teacher),
        )

    def __call__(self, stats: TokenStats, tokens: TokenStreams, context: StepContext) -> LossOutput:
        """Loss of every label; exactly 0 outside both regions."""
        labels = self._labels(stats, tokens, context)
        term = self.rule(labels)
        on_policy_T, guidance_T = labels.regions.on_policy_T, labels.regions.guidance_T
        loss_T = torch.where(on_policy_T, term.loss_T, 0.0)
        if self.guidance.beta and self.rule.needs.teacher:
            loss_T = loss_T + torch.where(guidance_T, self.guidance(stats, tokens), 0.0)
        counted_T = on_policy_T if term.counted_T is None else on_policy_T & term.counted_T
        return LossOutput(
            token_loss_T=loss_T,
            metrics=label_metrics(labels, term, self.needs, tau=self.outlier_threshold),
            denominator=(counted_T | guidance_T).sum(),
            trust_T=None if term.trust_T is None else term.trust_T.detach(),
            behaviour_logprob_T=labels.behaviour_logprob_T,
        )

    def trust(self, stats: TokenStats, tokens: TokenStreams, context: StepContext) -> Tensor:
        """Weight of the trusted part of every label, by the rule's gate or, without one, by the paper's gate, [T]."""
        labels = self._labels(stats, tokens, context)
        weight_T = self.rule(labels).trust_T
        return expected_acceptance(labels.reward_T) if weight_T is None else weight_T

    def _labels(self, stats: TokenStats, tokens: TokenStreams, context: StepContext) -> Labels:
        regions = Regions.of(tokens)
        from_engine = self.reward_logprob == "rollout"
        behaviour_T = tokens.rollout_logprob_T if from_engine else student_before(stats, tokens)
        reward_T = tokens.teacher_logprob_T - behaviour_T
        return Labels(
            stats=stats, tokens=tokens, context=context, regions=regions, importance=self.importance,
            behaviour_logprob_T=behaviour_T, reward_T=torch.where(regions.on_policy_T, reward_T, 0.0),
        )  # fmt: skip
