"""Every metric name of this project, with its unit and its meaning.

``docs/metrics.md`` holds the table made by :func:`markdown_table`; a test keeps the two equal.  A metric
that is not in the table is still written and sent to the sinks: the table is documentation, not a filter.
"""

from __future__ import annotations

from dataclasses import dataclass

PHASES = ("generate", "score", "train", "push", "save", "eval")
"""Phases of a step in the order in which they happen, which is the order of tables and stacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricInfo:
    """Unit and meaning of one metric."""

    unit: str
    meaning: str


def _info(unit: str, meaning: str) -> MetricInfo:
    return MetricInfo(unit=unit, meaning=meaning)


METRICS: dict[str, MetricInfo] = {
    "train/loss": _info("nats", "Sum of token losses divided by the global token count of the step."),
    "train/grad_norm": _info("norm", "Global L2 norm of the gradient, before clipping."),
    "train/learning_rate": _info("1", "Learning rate of the update."),
    "tropd/trusted_frac": _info(
        "share",
        "Mean trust weight of on-policy tokens by the method's gate; without a gate, by the paper's: min(1, q / p), "
        "whose mean is 1 - TV(p, q).",
    ),
    "tropd/outlier_frac": _info("share", "On-policy tokens whose K1 reward is below `--outlier-threshold`."),
    "tropd/clamped_frac": _info("share", "On-policy tokens whose reward a bound of the method replaced."),
    "tropd/selected_frac": _info("share", "On-policy tokens that the method's own criterion picked (entropy, stage)."),
    "tropd/reward_mean": _info("nats", "Mean K1 reward log q - log p over on-policy tokens (p student, q teacher)."),
    "tropd/k1_trusted": _info("nats", "Mean K1 reward, weighted by trust."),
    "tropd/k1_rejected": _info("nats", "Mean K1 reward, weighted by 1 - trust; tokens with q = 0 left out."),
    "tropd/forward_kl_topk": _info(
        "nats", "Mean forward KL on the teacher's top-k, raw form, over on-policy tokens, trusted or not."
    ),
    "tropd/jsd_topk": _info("nats", "Mean JSD with beta 1/2: top-k half and sampled half (TrOPD Eq. 4)."),
    "tropd/divergence": _info("nats", "Mean full-vocabulary divergence, of a method that is made of one."),
    "tropd/teacher_topk_mass": _info("share", "Teacher probability inside its own top-k."),
    "tropd/student_topk_mass": _info("share", "Student probability inside the teacher's top-k."),
    "tropd/own_topk_mass": _info("share", "Student probability inside its own top-k (`topk_rkl`)."),
    "tropd/teacher_mass_on_own_topk": _info("share", "Teacher probability inside the student's top-k (`topk_rkl`)."),
    "tropd/topk_overlap": _info("share", "The teacher's top-k ids that are in the student's own top-k."),
    "tropd/guidance_nll": _info("nats", "Mean negative log-likelihood of guidance tokens under the student."),
    "importance/ratio_mean": _info("1", "Mean probability ratio of a sampled token, trainer over rollout engine."),
    "importance/truncated_frac": _info("share", "On-policy tokens with a ratio above `--tis-cap`, corrected or not."),
    "importance/masked_frac": _info(
        "share", "On-policy tokens outside the IcePop window, or in samples that `seq_err` masks; corrected or not."
    ),
    "ppo/ratio_mean": _info("1", "Mean probability ratio of a sampled token, now over before the first update."),
    "ppo/clipped_frac": _info("share", "On-policy tokens whose ratio is outside the clip range, on either side."),
    "guidance/alpha": _info("share", "Annealed share of a teacher response that is given as guidance."),
    "guidance/frac": _info("share", "Response tokens that are guidance."),
    "guidance/len_mean": _info("tokens", "Mean guidance length of a rollout."),
    "rollout/len_mean": _info("tokens", "Mean response length of a rollout, guidance included."),
    "rollout/truncated_frac": _info("share", "Rollouts that ended at the length limit."),
    "rollout/lag_mean": _info(
        "updates", "Mean number of updates since the weights that wrote a rollout; 0 is strictly on-policy."
    ),
    "rollout/accuracy": _info(
        "share",
        "Share right among those of the first 64 rollouts whose answer is known and was not in the teacher's prefix.",
    ),
    "student/entropy": _info("nats", "Mean entropy of the student over on-policy tokens."),
    "student/entropy_threshold": _info("nats", "Entropy that the selected share of the rollout batch reaches; exact."),
    "student/guidance_entropy": _info("nats", "Mean entropy of the student over the tokens that `sft` imitates."),
    "student/logprob_mean": _info("nats", "Mean log-probability of the response tokens by the student."),
    "teacher/logprob_mean": _info(
        "nats", "Mean log-probability of the response tokens by the teacher; tokens with q = 0 left out."
    ),
    "reference/logprob_mean": _info("nats", "Mean log-probability of the response tokens by the reference."),
    "teacher/excluded_frac": _info("share", "Response tokens with q = 0."),
    "teacher/topk_missing_frac": _info(
        "share",
        "Written tokens that the gate rejects although no top-k was sent for them; see `--teacher-topk-margin`.",
    ),
    "teacher/payload_bytes_per_token": _info(
        "bytes",
        "Scores that the teacher sends to the ranks that train, by response token; 0 in the first step of a launch "
        "that has them from an earlier one.",
    ),
    "teacher/entropy": _info(
        "nats", "Mean full-vocabulary entropy of the teacher over on-policy tokens; absent where a teacher has none."
    ),
    "teacher/wait_s": _info("s", "Seconds that the trainer waited for the scores of a teacher elsewhere."),
    "teacher/busy_frac": _info(
        "share", "Time since the last batch that a dedicated teacher spent in scoring; the rest it waited."
    ),
    "teacher/scored_tokens": _info("tokens", "Response tokens of the step that the teacher's servers scored."),
    "teacher/bytes_per_token": _info(
        "bytes", "Bytes that the teacher's servers answered for each scored token, since the run was launched."
    ),
    "teacher/retries": _info("count", "Requests to the teacher's servers that were repeated, since the launch."),
    "teacher/restarts": _info("count", "Servers of the teacher started anew since the run was launched."),
    "teacher/NAME/rollouts": _info("count", "Rollouts of the batch that a teacher of `--teacher-config` scored."),
    "teacher/NAME/logprob_mean": _info(
        "nats", "Mean log-probability that it gave to their response tokens; tokens with q = 0 left out."
    ),
    "teacher/NAME/reward_mean": _info(
        "nats", "Mean of its log q - log p over what the student wrote, p at the rollout engine; q = 0 left out."
    ),
    "teacher/NAME/...": _info("", "What a teacher by itself measures, such as `busy_frac`, by the name of each."),
    "guard/transient_errors": _info(
        "updates", "Updates with a bad number that a second computation did not give; the second was made."
    ),
    "guard/persistent_errors": _info(
        "updates", "Updates that a second computation gave bad numbers too; both only in steps with such updates."
    ),
    "reward/mean": _info("reward", "Mean of `--reward-function` over the rollout batch."),
    "reward/abs_max": _info("reward", "Largest absolute value of it in the rollout batch."),
    "reward/flat_groups_frac": _info("share", "Prompts whose samples all have one reward: their advantage is 0."),
    "gradient/norm_reverse_kl": _info(
        "norm", "Gradient of the exact full-vocabulary reverse KL, first update of the step."
    ),
    "gradient/norm_trusted_positive": _info("norm", "Gradient of trusted tokens with a positive reward alone."),
    "gradient/norm_trusted_negative": _info("norm", "Gradient of the other trusted tokens alone."),
    "gradient/norm_rejected": _info("norm", "Gradient of rejected tokens alone."),
    "gradient/norm_guidance": _info("norm", "Gradient of guidance tokens alone."),
    "gradient/cosine_trusted_positive": _info("1", "Cosine of that gradient with the exact reverse KL's."),
    "gradient/cosine_trusted_negative": _info("1", "Cosine of that gradient with the exact reverse KL's."),
    "gradient/cosine_rejected": _info("1", "Cosine of that gradient with the exact reverse KL's."),
    "gradient/cosine_guidance": _info("1", "Cosine of that gradient with the exact reverse KL's."),
    "parity/logprob_abs_diff_mean": _info("nats", "Mean |log p| difference, rollout engine against trainer."),
    "parity/logprob_abs_diff_max": _info("nats", "Largest such difference in the step."),
    "parity/probe_abs_diff_mean": _info(
        "nats", "Mean |log p| difference on fixed sequences after a push, the worst engine's; SGLang only."
    ),
    "engine/idle_frac": _info("share", "Time since the last step in which the engines had nothing to write."),
    "engine/restarts": _info("count", "SGLang servers started anew since the run was launched."),
    "engine/reissued": _info("count", "Prompts written again, because a server died or answered wrongly."),
    "engine/bad_responses": _info("count", "Answers of servers that no rollout can have."),
    "engine/stale_weights": _info("count", "Answers by other weights than those of the step."),
    "engine/planned_failed": _info("count", "Planned updates that failed; whole tensors were sent instead."),
    "engine/given_up": _info("count", "SGLang servers that failed too often and are not used any more."),
    "engine/unverified": _info("count", "Pushes to SGLang servers that cannot hash their weights."),
    "throughput/tokens_per_second": _info("tokens/s", "Response tokens of the step by wall seconds of the step."),
    "memory/peak_bytes": _info("bytes", "Peak memory of rank 0: of its GPU, or resident where it has none."),
    "time/generate": _info("s", "Wall seconds of rank 0 in generation."),
    "time/score": _info("s", "Wall seconds in teacher scoring."),
    "time/train": _info("s", "Wall seconds in forward, backward and the update."),
    "time/push": _info("s", "Wall seconds in pushing weights to the engines."),
    "time/save": _info("s", "Wall seconds in checkpoints and reports."),
    "time/eval": _info("s", "Wall seconds in evaluation."),
}


def markdown_table() -> str:
    """The table that ``docs/metrics.md`` holds."""
    rows = [f"| `{name}` | {info.unit} | {_escape_pipes(info.meaning)} |" for name, info in METRICS.items()]
    return "\n".join(["| metric | unit | meaning |", "|---|---|---|", *rows])


def _escape_pipes(text: str) -> str:
    return text.replace("|", "\\|")
