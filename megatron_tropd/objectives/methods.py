"""The table of methods by name.  To add a method, add a row (and a file for its rule, if the rule is new)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tropd.objectives.base import Objective
from megatron_tropd.objectives.entropy_selection import EntropySelection
from megatron_tropd.objectives.eopd import Eopd
from megatron_tropd.objectives.forward_kl import ForwardKlEverywhere
from megatron_tropd.objectives.full_vocabulary import ControlVariate, FullVocabulary
from megatron_tropd.objectives.gates import Gate
from megatron_tropd.objectives.gopd import Gopd
from megatron_tropd.objectives.grpo import Grpo
from megatron_tropd.objectives.jsd import TopKJsd
from megatron_tropd.objectives.labels import Rule
from megatron_tropd.objectives.recipes import Maker, forward_kl, on_data, rule, topk_margin, trust_region
from megatron_tropd.objectives.reopold import ReopoldTwoStage, reward_bound
from megatron_tropd.objectives.reverse_kl import ReverseKlOnOwnTopK
from megatron_tropd.objectives.reward_floor import FlooredReward
from megatron_tropd.objectives.settings import ObjectiveSettings, pick
from megatron_tropd.objectives.supervised import Supervised
from megatron_tropd.objectives.topd import Topd
from megatron_tropd.objectives.tropd_aopd import TropdAopd
from megatron_tropd.objectives.trust_region import TrustRegion


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A row of the table."""

    make: Maker
    guided: bool = False
    """Whether the recipe starts the student from teacher prefixes."""
    loss: str = ""
    """Loss of a token the student wrote, for the table in docs/objectives.md."""
    source: str = ""
    denominator: str = "all"


def _fkl(s: ObjectiveSettings) -> Rule:
    return ForwardKlEverywhere(forward_kl=forward_kl(s), grad=pick(s.fkl_grad, "direct"))


def _jsd(s: ObjectiveSettings) -> Rule:
    return TopKJsd(top_k=s.top_k, beta=s.jsd_beta, grad=pick(s.fkl_grad, "direct"))


def _tropd(s: ObjectiveSettings) -> TrustRegion:
    return trust_region(s, pick(s.gate, "bernoulli"), "forward_kl")


def _tropd_official(s: ObjectiveSettings) -> Rule:
    return trust_region(s, pick(s.gate, "bernoulli"), "forward_kl", support="renorm", grad="reward", logprob_min=-10.0)


def _reopold_bound(s: ObjectiveSettings) -> float:
    return reward_bound(s.reopold_lambda, s.reopold_bound)


def _reopold_two_stage(s: ObjectiveSettings) -> Rule:
    return ReopoldTwoStage(bound=_reopold_bound(s), entropy_share=s.entropy_share, switch=s.reopold_switch)


def _floored(s: ObjectiveSettings, *, only_rejected: bool) -> Rule:
    support = forward_kl(s, "tail" if only_rejected else "raw")
    return FlooredReward(
        forward_kl=support,
        only_rejected=only_rejected,
        floor=s.reward_floor,
        coef=s.outlier_coef,
        topk_margin=topk_margin(s),
    )


_TROPD = "TrOPD, arXiv 2606.01249"

METHODS: dict[str, Method] = {
    # baselines of the paper
    "opd": Method(
        make=rule(lambda s: TrustRegion(gate=Gate(kind="none"))),
        loss="PG(R)", source="Thinking Machines' OPD; TrOPD Eq. 2",
    ),
    "fkl": Method(make=rule(_fkl), loss="FKL_k", source="TrOPD Eq. 3"),
    "fkl_reward": Method(
        make=rule(lambda s: ForwardKlEverywhere(forward_kl=forward_kl(s), grad=pick(s.fkl_grad, "reward"))),
        loss="PG(-FKL_k)", source="replication of TrOPD Table 1 only: its mean gradient is zero",
    ),
    "jsd": Method(
        make=rule(_jsd),
        loss="b sum_V q log(q / m) + PG(-(1 - b) log(p(x) / m(x))), m = b q + (1 - b) p", source="TrOPD Eq. 4",
    ),
    "jsd_reward": Method(
        make=rule(lambda s: TopKJsd(top_k=s.top_k, beta=s.jsd_beta, grad=pick(s.fkl_grad, "reward"))),
        loss="PG(-JSD) of the same two halves", source="TrOPD Eq. 4 as veRL would train it",
    ),
    "entropy_opd": Method(
        make=rule(lambda s: EntropySelection(share=s.entropy_share, denominator=s.entropy_denominator)),
        loss="1[H_p >= h] PG(R)", source="TrOPD Table 1; arXiv 2506.01939", denominator="all, or kept",
    ),
    "eopd": Method(
        make=rule(lambda s: Eopd(
            forward_kl=forward_kl(s, "renorm"), entropy_threshold=s.teacher_entropy_threshold, coef=s.outlier_coef,
            only_unsure_topk=s.topk_margin > 0)),
        loss="PG(R) + 1[H_q > 0.8] c FKL_k, renorm", source="EOPD, arXiv 2603.07079",
    ),
    "clip_outlier": Method(
        make=rule(lambda s: trust_region(s, "threshold", "clip")), loss="PG(max(R, tau))", source="TrOPD Table 1",
    ),
    "mask_outlier": Method(
        make=rule(lambda s: trust_region(s, "threshold", "mask")), loss="1[R > tau] PG(R)", source="TrOPD Table 1",
    ),
    "fkl_outlier": Method(
        make=rule(_tropd), loss="w PG(R) + (1 - w) c FKL_k, as tropd without a prefix", source="TrOPD Table 1",
    ),
    "reopold": Method(
        make=rule(lambda s: trust_region(s, "threshold", "clip", tau=_reopold_bound(s))),
        loss="PG(max(R, c(lambda)))", source="REOPOLD, arXiv 2603.11137, as in TrOPD Table 3",
    ),
    "reopold_two_stage": Method(
        make=rule(_reopold_two_stage),
        loss="M PG(max(R, c(lambda))), M = 1[R >= c], later 1[H_p >= h]", source="REOPOLD, arXiv 2603.11137",
        denominator="kept",
    ),
    "aopd": Method(
        make=rule(lambda s: trust_region(s, "probability", "forward_kl")),
        loss="PG(R) where q(x) - p(x) > 0, else c FKL_k", source="AOPD, arXiv 2605.06387",
    ),
    # the paper's method
    "tropd": Method(make=rule(_tropd), guided=True, loss="w PG(R) + (1 - w) c FKL_k", source=f"{_TROPD}, Eq. 9"),
    "tropd_paper": Method(make=rule(_tropd), guided=True, loss="another name of tropd", source=_TROPD),
    "tropd_mask": Method(
        make=rule(lambda s: trust_region(s, pick(s.gate, "threshold"), "mask")), guided=True,
        loss="1[R > tau] PG(R); with --gate bernoulli: w PG(R)", source="TrOPD Table 5",
    ),
    "tropd_clip": Method(
        make=rule(lambda s: trust_region(s, pick(s.gate, "threshold"), "clip")), guided=True,
        loss="PG(max(R, tau)); with --gate bernoulli: PG(w R + (1 - w) tau)", source="TrOPD Table 5",
    ),
    "tropd_aopd": Method(
        make=rule(lambda s: TropdAopd(tropd=_tropd(s), reading=s.tropd_aopd_reading, coef=s.tropd_aopd_coef)),
        guided=True, loss="tropd + c 1[R > 0] PG(R); or w PG(R) + c 1[R <= 0] FKL_k", source="TrOPD Table 6",
    ),
    "tropd_official": Method(
        make=rule(_tropd_official, guidance_grad="logratio_reward"),
        guided=True, loss="PG(w R - (1 - w) c FKL_k), renorm, log-probabilities >= -10",
        source="reports about TrOPD's published code; for replication",
    ),
    # ours
    "tropd_plus": Method(
        make=rule(lambda s: trust_region(s, pick(s.gate, "expected"), "forward_kl", support="tail")), guided=True,
        loss="w PG(R) + (1 - w) c FKL_k, w = min(1, e^R), tail", source="ours",
    ),
    "tropd_floor": Method(
        make=rule(lambda s: _floored(s, only_rejected=True)),
        loss="PG(max(R, f)) + (1 - min(1, e^R)) c FKL_k, tail", source="ours",
    ),
    "clip_fkl": Method(
        make=rule(lambda s: _floored(s, only_rejected=False)), loss="PG(max(R, f)) + c FKL_k", source="ours",
    ),
    # related methods
    "gopd": Method(
        make=rule(lambda s: Gopd(extrapolation=s.gopd_lambda)),
        loss="PG(l (log q(x) - log ref(x)) - (log p(x) - log ref(x)))", source="G-OPD / ExOPD, arXiv 2602.12125",
    ),
    "topd": Method(
        make=rule(lambda s: Topd(alpha=s.topd_alpha)), loss="PG(log(a q(x) / p(x) + 1 - a))",
        source="TOP-D, arXiv 2607.04751 (not TrOPD)",
    ),
    "vopd": Method(make=rule(lambda s: ControlVariate()), loss="PG(R + KL(p, q))", source="vOPD, arXiv 2605.07865"),
    "full_fkl": Method(
        make=rule(lambda s: FullVocabulary(divergence="forward_kl")), loss="KL(q, p)", source="exact forward KL",
    ),
    "full_rkl": Method(
        make=rule(lambda s: FullVocabulary(divergence="reverse_kl")), loss="KL(p, q)", source="exact reverse KL",
    ),
    "topk_rkl": Method(
        make=rule(lambda s: ReverseKlOnOwnTopK(top_k=s.top_k, support=s.rkl_support)),
        loss="sum_V p log(p / q) + (1 - P) log((1 - P) / (1 - Q)), V the student's top-k", source="field practice",
    ),
    "gkd_jsd": Method(
        make=rule(lambda s: FullVocabulary(divergence="jsd", beta=s.jsd_beta)),
        loss="b KL(q, m) + (1 - b) KL(p, m)", source="GKD, arXiv 2306.13649",
    ),
    # on the responses of the data
    "kd": Method(
        make=on_data(lambda s: ForwardKlEverywhere(forward_kl=forward_kl(s), of_data=True)),
        loss="nothing; FKL_k on the responses of the data",
        source="word-level distillation, arXiv 1606.07947; GKD with lambda = 0", denominator="response tokens",
    ),
    "sft": Method(
        make=lambda s: Supervised(), loss="nothing; -log p(y) on the responses of the data", source="cross-entropy",
        denominator="response tokens",
    ),
    # without a teacher
    "grpo": Method(
        make=rule(lambda s: Grpo(denominator=s.grpo_denominator, kl_coef=s.grpo_kl_coef), correction="icepop",
                  clip_high=0.28),
        loss="PG(A) / written tokens of the sample, A the group advantage",
        source="GRPO, arXiv 2402.03300; clip-higher, 2503.14476", denominator="samples, or tokens",
    ),
}  # fmt: skip


def is_guided(name: str) -> bool:
    """Whether ``name`` uses teacher prefixes unless told otherwise."""
    return name in METHODS and METHODS[name].guided


def make_objective(name: str, settings: ObjectiveSettings) -> Objective:
    """The objective called ``name``.

    Raises:
        ValueError: the name is unknown (the message lists the known names), or a setting is out of its range.
    """
    if name not in METHODS:
        raise ValueError(f"--objective {name[:80]!r} is not known; choose one of {', '.join(METHODS)}")
    return METHODS[name].make(settings)


def markdown_table() -> str:
    """The table that ``docs/objectives.md`` holds; a test keeps the two equal."""
    head = (
        "| `--objective` | a token the student wrote | asked for | prefix | denominator | source |\n" + "|---" * 6 + "|"
    )
    rows = [
        f"| `{name}` | {row.loss} | {_payload(row)} | {'yes' if row.guided else 'no'} | {row.denominator} "
        f"| {row.source} |"
        for name, row in METHODS.items()
    ]
    return "\n".join([head, *rows])


def _payload(row: Method) -> str:
    needs = row.make(ObjectiveSettings()).needs
    parts = {
        "log q(x)": needs.teacher,
        f"top-{needs.top_k}": needs.top_k and needs.topk_of == "teacher",
        f"log q at p's top-{needs.top_k}": needs.student_top_k,
        "H_q": needs.teacher_entropy,
        "hidden states": needs.divergence,
        "log ref(x)": needs.reference_logprob,
        "quantile of H_p": needs.entropy_quantile,
        "rewards": needs.rewards,
        "responses of the data": not needs.rollouts,
    }
    return ", ".join(name for name, wanted in parts.items() if wanted)
