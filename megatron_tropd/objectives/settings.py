"""Settings of the objectives.  Each field is a flag; a method reads only the settings that it has.

``auto`` means the method's own choice, which is stated in its row in ``methods.py``.  For a number, 0 means the same
where the help text says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

GateKind = Literal["bernoulli", "expected", "threshold", "probability", "none"]
FklSupport = Literal["raw", "renorm", "renorm_both", "tail"]
RklSupport = Literal["raw", "renorm_both", "tail"]
FklGrad = Literal["direct", "reward"]
GuidanceGrad = Literal["nll", "logratio_reward"]
RewardLogprob = Literal["trainer", "rollout"]
Correction = Literal["off", "tis", "icepop", "seq_err"]
Denominator = Literal["all", "kept"]
Auto = Literal["auto"]

Chosen = TypeVar("Chosen", bound=str)


def pick(setting: Chosen | Auto, own: Chosen) -> Chosen:
    """What the user chose, or the method's ``own`` choice where the setting is ``auto``."""
    return own if setting == "auto" else setting  # type: ignore[return-value]  # mypy keeps Auto in the union


def _number(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveSettings:
    """Settings of the objectives.  Defaults are the TrOPD paper's or, where it has none, the baseline papers'."""

    top_k: int = _number(64, "teacher tokens per position for a forward KL or a JSD")
    gate: GateKind | Auto = _number("auto", "how the tropd methods trust a token")
    gate_margin: float = _number(0.0, "the probability gate trusts where q(x) - p(x) is above this (AOPD)")
    outlier_threshold: float = _number(-1.72, "nats below which a K1 reward is an outlier: tau")
    outlier_coef: float = _number(1.0, "weight of the forward KL where a method adds or switches to one")
    fkl_support: FklSupport | Auto = _number("auto", "form of the top-k forward KL")
    fkl_grad: FklGrad | Auto = _number("auto", "differentiate the forward KL or JSD, or use it as a detached reward")
    fkl_clamp_zero: bool = _number(False, "cut a negative top-k forward KL to 0; its gradient goes with it")
    fkl_logprob_min: float = _number(0.0, "floor of log-probabilities in a top-k forward KL; 0: the method's own")
    fkl_max: float = _number(0.0, "ceiling of a top-k forward KL; 0 for none")
    rkl_support: RklSupport = _number("tail", "form of topk_rkl: raw, renorm_both, or all other tokens as one (tail)")
    reward_logprob: RewardLogprob = _number("trainer", "whose log p(x) is in the K1 reward and the gate")
    reward_floor: float = _number(-2.0, "nats below which tropd_floor and clip_fkl clip the K1 reward")
    guidance_beta: float = _number(0.001, "weight of the imitation loss on prefix tokens")
    guidance_grad: GuidanceGrad | Auto = _number("auto", "imitate the prefix, or reward it by log p - log q")
    jsd_beta: float = _number(0.5, "weight of the teacher in the mixture of a JSD")
    entropy_share: float = _number(0.2, "share of the batch's tokens that entropy selection keeps")
    entropy_denominator: Denominator = _number("all", "entropy_opd divides by all tokens or by those it keeps")
    teacher_entropy_threshold: float = _number(0.8, "nats of teacher entropy above which eopd adds its forward KL")
    reopold_lambda: float = _number(0.3, "mixture weight that bounds REOPOLD's reward from below")
    reopold_bound: Literal["jensen", "logit"] = _number("jensen", "log(l) / (1 - l), or log(l / (1 - l))")
    reopold_switch: float = _number(0.5, "share of the steps after which reopold_two_stage selects by entropy")
    tropd_aopd_reading: Literal["add_pg_on_positive", "union_fkl"] = _number(
        "add_pg_on_positive", "how tropd_aopd joins the two objectives"
    )
    tropd_aopd_coef: float = _number(1.0, "weight of the AOPD term in tropd_aopd")
    gopd_lambda: float = _number(1.25, "extrapolation of gopd beyond the teacher; 1 is opd")
    topd_alpha: float = _number(0.2, "share of the teacher in topd's proximal teacher")
    importance_correction: Correction | Auto = _number("auto", "weight for the difference of engine and trainer")
    tis_cap: float = _number(2.0, "tis: largest weight")
    icepop_low: float = _number(0.5, "icepop: a smaller trainer/engine ratio masks the token")
    icepop_high: float = _number(5.0, "icepop: a larger trainer/engine ratio masks the token")
    sequence_error_max: float = _number(2.0, "seq_err: mean exp of absolute log-probability gaps that masks a sample")
    ppo_clip: float = _number(0.2, "clip of the policy ratio when a rollout batch gets several updates")
    ppo_clip_high: float = _number(0.0, "its upper side; 0 for the method's own")
    grpo_denominator: Literal["samples", "tokens"] = _number(
        "samples", "grpo: mean over samples of token means, or tokens"
    )
    grpo_kl_coef: float = _number(0.0, "grpo: weight of a KL to the reference model")
    num_minibatches: int = 1
    """Updates per rollout batch, the flag --num-minibatches of the training section."""
    rollout_lag: int = 0
    """Batches by which the rollouts' weights may be older than the trainer's, the flag --rollout-lag."""
    topk_margin: float = 0.0
    """The flag --teacher-topk-margin in nats; 0: the teacher sends the top-k of all tokens."""
    topk_share: float = 0.0
    """Share of the samples whose top-k comes whole all the same, the flag --log-topk-share."""
    log_teacher_entropy: bool = False
    """Whether every teacher of the run gives its entropy, for a metric of it (``setup/objective.py``)."""

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):  # NaN passes comparisons such as value < 0
                raise ValueError(f"--{name.replace('_', '-')} {value} must be a finite number")
        for name in ("outlier_coef", "tropd_aopd_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must not be negative")


def markdown_table() -> str:
    """The table of settings that ``docs/objectives.md`` holds; a test keeps the two equal."""
    rows = [
        f"| `--{field.name.replace('_', '-')}` | {str(field.default).lower()} | {field.metadata['help']} |"
        for field in fields(ObjectiveSettings)
        if field.metadata
    ]
    return "\n".join(["| flag | default | |", "|---|---|---|", *rows])
