"""The range of every number of a configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_tropd.cli import to_flags
from megatron_tropd.config import TrainConfig
from megatron_tropd.setup.problems import Problems


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from ``low`` to ``high``; ``open_low`` and ``open_high`` leave out the end itself."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def complaint(self, value: float) -> str | None:
        """Return what is wrong with ``value``; None if it is in the range."""
        if not math.isfinite(value):
            return "must be a finite number"
        too_small = value <= self.low if self.open_low else value < self.low
        too_large = value >= self.high if self.open_high else value > self.high
        if too_small and self.open_low and self.low == 0:
            return "must be positive"
        if (too_small or too_large) and self.high <= 1:
            return f"must be in {'[('[self.open_low]}{self.low:g}, {self.high:g}{'])'[self.open_high]}"
        if too_small:
            return "must not be negative" if self.low == 0 else f"must be at least {self.low:.12g}"
        return f"must be at most {self.high:.12g}" if too_large else None


# Upper ends are far above what anyone uses.  They keep sums and products of settings within 64 bits and float32.
_COUNT = Range(1, 10**9)
_COUNT_OR_NONE = Range(0, 10**9)
_RANKS = Range(1, 10**6)
_RANKS_OR_DEFAULT = Range(0, 10**6)
_SHARE = Range(0, 1)
_WEIGHT = Range(0, 10**6)
_NATS = Range(-(10**4), 10**4)
_SPIKE = Range(0, 1e300, open_low=True)
_MINUTES_OF_A_YEAR = 525_600

RANGES = {
    "make-vocab-size-divisible-by": Range(1, 10**6),
    "tensor-model-parallel-size": _RANKS, "pipeline-model-parallel-size": _RANKS,
    "expert-model-parallel-size": _RANKS, "expert-tensor-parallel-size": _RANKS_OR_DEFAULT,
    "teacher-tensor-model-parallel-size": _RANKS, "teacher-pipeline-model-parallel-size": _RANKS,
    "teacher-expert-model-parallel-size": _RANKS, "teacher-expert-tensor-parallel-size": _RANKS_OR_DEFAULT,
    "num-virtual-stages-per-pipeline-rank": _RANKS, "context-parallel-size": _RANKS,
    "decoder-first-pipeline-num-layers": _RANKS_OR_DEFAULT, "decoder-last-pipeline-num-layers": _RANKS_OR_DEFAULT,
    "teacher-decoder-first-pipeline-num-layers": _RANKS_OR_DEFAULT,
    "teacher-decoder-last-pipeline-num-layers": _RANKS_OR_DEFAULT,
    "teacher-num-servers": Range(1, 10**4), "teacher-sglang-tp-size": Range(1, 10**4),
    "exit-interval": _COUNT_OR_NONE, "exit-duration-in-mins": Range(0, _MINUTES_OF_A_YEAR),
    "grace-period": Range(0, 60 * _MINUTES_OF_A_YEAR, open_low=True),
    "distributed-timeout-minutes": Range(0, _MINUTES_OF_A_YEAR, open_low=True),
    "rank-heartbeat-timeout": Range(0, 60 * _MINUTES_OF_A_YEAR), "hang-timeout-minutes": Range(0, _MINUTES_OF_A_YEAR),
    "max-prompt-length": _COUNT, "max-response-length": _COUNT, "min-response-share": _SHARE,
    "rollout-batch-size": _COUNT, "n-samples-per-prompt": Range(1, 1 << 20), "rollout-max-batch-size": _COUNT,
    "rollout-lag": _SHARE, "teacher-world-size": _RANKS_OR_DEFAULT, "student-world-size": _RANKS_OR_DEFAULT,
    "rollout-num-engines-per-node": Range(0, 10**3),
    "rollout-num-engines": Range(1, 10**4), "rollout-num-gpus-per-node": Range(0, 10**3),
    "sglang-tp-size": Range(1, 10**4),
    "teacher-topk-margin": _NATS, "log-topk-share": _SHARE,
    "update-weight-buffer-size": Range(1, 1 << 40),
    "sglang-start-timeout": Range(0, 60 * _MINUTES_OF_A_YEAR, open_low=True),
    "sglang-request-timeout": Range(0, 60 * _MINUTES_OF_A_YEAR, open_low=True),
    "parity-limit": Range(0, 10**4),
    "guidance-steps": _COUNT_OR_NONE,
    "top-k": _COUNT, "gate-margin": Range(-1, 1), "outlier-threshold": _NATS, "outlier-coef": _WEIGHT,
    "fkl-logprob-min": _NATS, "fkl-max": Range(0, 10**4), "reward-floor": _NATS, "guidance-beta": _WEIGHT,
    "jsd-beta": _SHARE, "entropy-share": _SHARE, "teacher-entropy-threshold": Range(0, 10**4),
    "reopold-lambda": _SHARE, "reopold-switch": _SHARE, "tropd-aopd-coef": _WEIGHT, "gopd-lambda": _WEIGHT,
    "topd-alpha": _SHARE, "tis-cap": _WEIGHT, "icepop-low": _WEIGHT, "icepop-high": _WEIGHT,
    "sequence-error-max": _WEIGHT, "ppo-clip": _SHARE, "ppo-clip-high": _WEIGHT, "grpo-kl-coef": _WEIGHT,
    "train-iters": _COUNT, "num-minibatches": Range(1, 10**6), "max-tokens-per-microbatch": _COUNT,
    "logits-chunk-tokens": _COUNT_OR_NONE,
    "lr": Range(0, 100, open_low=True), "min-lr": Range(0, 100), "lr-warmup-iters": _COUNT_OR_NONE,
    "weight-decay": Range(0, 100), "adam-beta1": Range(0, 1, open_high=True), "adam-beta2": Range(0, 1, open_high=True),
    "adam-eps": Range(0, 1, open_low=True), "spike-limit": _SPIKE, "spike-grad-norm": _SPIKE, "spike-reward": _SPIKE,
    "clip-grad": _WEIGHT, "seed": Range(0, (1 << 32) - 1),
    "save-interval": _COUNT_OR_NONE, "keep-last": _COUNT_OR_NONE, "save-retain-interval": _COUNT_OR_NONE,
    "eval-interval": _COUNT_OR_NONE, "eval-prompts": _COUNT_OR_NONE,
    "eval-num-samples": Range(1, 1 << 20),
    "heartbeat-interval": Range(0, 60 * _MINUTES_OF_A_YEAR),
    "log-interval": _COUNT, "gradient-diagnostics-interval": _COUNT_OR_NONE, "rollout-log-interval": _COUNT_OR_NONE,
}  # fmt: skip
"""Range of every numeric flag, by name.  Methods have stricter ranges for some of their own numbers."""


def check_ranges(config: TrainConfig, problems: Problems, *, prefix: str = "") -> None:
    """Check that every number is in its range, of the flags that begin with ``prefix``."""
    flags = to_flags(config)
    for name, allowed in RANGES.items():
        if not name.startswith(prefix):
            continue
        if complaint := allowed.complaint(flags[name]):
            problems.errors.append(f"--{name} {flags[name]} {complaint}")
