"""Checks of a directory of stored scores (--teacher-scores) before a run reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_tropd.cli import ConfigError
from megatron_tropd.config import TrainConfig
from megatron_tropd.data.guidance import whole_responses
from megatron_tropd.data.prompts import PromptSet
from megatron_tropd.objectives.base import Objective
from megatron_tropd.setup.problems import Problems
from megatron_tropd.teacher.stored.files import MANIFEST, Manifest, ScoreFiles, key_of
from megatron_tropd.types import Rollout

SHARD_RESPONSES = 256
"""Responses of a shard.  While they are made, rank 0 holds the scores of one: 520 bytes per token with a top-64."""


def key_of_rollout(rollout: Rollout) -> bytes:
    """Return what names the response of ``rollout`` in the files."""
    return key_of(rollout.token_ids, rollout.prompt_len)


def response_parts(prompts: PromptSet) -> Iterator[list[Rollout]]:
    """The responses of each shard, in the order of the data."""
    for start in range(0, len(prompts), SHARD_RESPONSES):
        yield whole_responses(prompts[start : start + SHARD_RESPONSES], 0, scored=True)


def check_teacher_scores(
    config: TrainConfig,
    objective: Objective,
    prompts: PromptSet,
    vocab_size: int,
    problems: Problems,
    scores_domain: Callable[[str], bool],
) -> None:
    """Check that --teacher-scores has what the run will read: the right numbers, of every response to a prompt of the
    domains that this teacher scores."""
    name, needs = config.teacher.teacher_scores, objective.needs
    files = problems.attempt(lambda: _open(name))
    if files is None:
        return
    manifest = files.manifest
    again = "score the responses again, in another directory"
    problems.require(
        manifest.top_k >= needs.top_k,
        f"--teacher-scores {name} holds a top-{manifest.top_k}, --top-k is {needs.top_k}: lower it, or {again}",
    )
    problems.require(
        manifest.vocab_size == vocab_size,
        f"--teacher-scores {name} is over {manifest.vocab_size} ids, the models of this run have {vocab_size} in "
        f"common: {again}; or, if it is another teacher that has fewer ids, leave that one out",
    )
    missing, first = 0, None
    for part in response_parts(prompts):
        rollouts = [rollout for rollout in part if scores_domain(prompts.by_uid[rollout.prompt_uid].domain)]
        absent = files.missing(key_of_rollout(rollout) for rollout in rollouts)
        missing += len(absent)
        first = rollouts[absent[0]].prompt_uid if absent and first is None else first
    problems.require(
        not missing,
        f"--teacher-scores {name} has no scores of {missing} of {len(prompts)} responses of --prompt-data, the first "
        f"that of prompt {first}: run megatron_tropd.score_responses with this data and these lengths",
    )


def holds_entropies(config: TrainConfig) -> bool:
    """Return whether --teacher-scores has the teacher's entropy of every token; False where it cannot be read, which
    :func:`check_teacher_scores` tells."""
    try:
        return Manifest.read(Path(config.teacher.teacher_scores)).entropy
    except (OSError, ValueError):
        return False


def _open(name: str) -> ScoreFiles:
    try:
        return ScoreFiles(name)
    except FileNotFoundError as error:
        raise ValueError(
            f"--teacher-scores {name} has no {MANIFEST}: make it with megatron_tropd.score_responses"
        ) from error


def check_placement(config: TrainConfig, objective: Objective, problems: Problems) -> None:
    """Check that the settings of stored scores suit each other and the method; no file is read."""
    name, stored = f"--objective {config.objective.objective}", config.teacher.teacher_scores
    if config.teacher.teacher_placement != "file":
        problems.require(
            not stored,
            f"--teacher-scores {stored} is for --teacher-placement file; it is {config.teacher.teacher_placement}",
        )
        return
    needs = objective.needs
    problems.require(stored, "--teacher-placement file needs --teacher-scores DIR: the scores to read")
    problems.require(
        needs.teacher and not needs.rollouts,
        f"{name} cannot use --teacher-placement file: stored scores are of the responses of the data, with which a "
        "teacher is used by --objective kd only",
    )
    problems.require(
        not config.logging.gradient_diagnostics_interval,
        "--gradient-diagnostics-interval needs the teacher's whole distributions, and --teacher-placement file has a "
        "top-k: set it to 0",
    )


def check_teacher_digest(config: TrainConfig, digest: str) -> None:
    """Check that the stored scores of a teacher are its own.

    Raises:
        ConfigError: they are of another.
    """
    found = Manifest.read(Path(config.teacher.teacher_scores)).teacher
    if found != digest:
        raise ConfigError(
            [
                f"--teacher-scores {config.teacher.teacher_scores} is of a teacher with the digest {found[:12]}; that "
                f"of --teacher-hf-checkpoint / --teacher-load has {digest[:12]}: give the teacher that scored, or "
                "score again"
            ]
        )
