"""A rule's interface, its input and its output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from megatron_tropd.objectives.base import Regions
from megatron_tropd.objectives.importance import Importance, policy_gradient
from megatron_tropd.types import Needs, StepContext, TokenStats, TokenStreams


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Labels of a batch with the numbers every method starts from."""

    stats: TokenStats
    tokens: TokenStreams
    context: StepContext
    regions: Regions
    behaviour_logprob_T: Tensor
    """log p(x) of the policy that wrote the token, detached."""
    reward_T: Tensor
    """K1 reward R = log q(x) - log p(x), detached; 0 where not ON_POLICY, -inf where the teacher excludes x."""
    importance: Importance = field(default_factory=Importance)

    def policy_gradient(self, advantage_T: Tensor) -> Tensor:
        """PG(A), [T]: value -A and the score-function gradient of it (``importance.py``)."""
        return policy_gradient(advantage_T, self.stats, self.tokens, self.importance)


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """Output of a rule, one entry per label; entries that are not ON_POLICY are not read."""

    loss_T: Tensor  # carries grad
    trust_T: Tensor | None = None
    """Weight in [0, 1] of the trusted part; None for a method without a gate."""
    clamped_T: Tensor | None = None
    """Boolean: a bound is active."""
    selected_T: Tensor | None = None
    """Boolean: picked by the method's own criterion (an entropy, a phase)."""
    topk_T: Tensor | None = None
    """Boolean: the loss reads the teacher's top-k; None for a rule that does not say, or reads none."""
    counted_T: Tensor | None = None
    """Boolean: the label adds one to the denominator; None if every ON_POLICY label does."""


class Rule(Protocol):
    """What a method does with the tokens the student wrote; ``distillation.py`` does the rest."""

    @property
    def needs(self) -> Needs:
        """The inputs that the rule has to be given."""
        ...

    def __call__(self, labels: Labels) -> Term:
        """Entries of every label, row-local: they depend only on that label's numbers and on ``labels.context``."""
        ...
