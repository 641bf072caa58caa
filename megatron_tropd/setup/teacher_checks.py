"""Checks of the teacher, or of several: placements, domains and weights, stored scores."""

from __future__ import annotations

from collections import Counter

from megatron_tropd.config import TrainConfig
from megatron_tropd.data.prompts import PromptSet
from megatron_tropd.objectives.base import Objective
from megatron_tropd.setup.problems import Problems
from megatron_tropd.setup.ranges import check_ranges
from megatron_tropd.setup.stored_scores import check_placement, check_teacher_scores
from megatron_tropd.setup.teacher_servers import check_teacher_placement
from megatron_tropd.teacher.several.shares import Shares


def check_teachers(config: TrainConfig, objective: Objective, problems: Problems) -> None:
    """Check the settings of each teacher, and of several against each other; no file is read."""
    for role, own in config.by_teacher.items():
        with problems.named(config.file_of(role)):
            if config.teachers:  # the run's own are checked with all other flags
                check_ranges(own, problems, prefix="teacher-")
            check_teacher_placement(own, objective.needs, problems)
            check_placement(own, objective, problems)
    if config.teachers:
        _check_together(config, objective, problems)


def _check_together(config: TrainConfig, objective: Objective, problems: Problems) -> None:
    name, needs = f"--objective {config.objective.objective}", objective.needs
    problems.require(
        needs.divergence is None,
        f"{name} compares with the full distribution of one teacher: leave out --teacher-config",
    )
    problems.require(
        not config.logging.gradient_diagnostics_interval,
        f"--gradient-diagnostics-interval {config.logging.gradient_diagnostics_interval} compares with the full "
        "distribution of one teacher: leave it at 0 with --teacher-config",
    )
    mixed = sorted(Shares(config.teachers).mixed)
    problems.require(
        not (mixed and needs.teacher_entropy),
        f"{name} needs the teacher's entropy, which a mixture does not have ({', '.join(mixed)} score "
        "the same domains): in --teacher-config give each its own `domains`",
    )
    on_servers = {role: own for role, own in config.by_teacher.items() if own.teacher.teacher_placement == "server"}
    _refuse_shared(
        Counter(url for own in on_servers.values() for url in set(own.teacher.teacher_urls)), "teacher-urls", problems
    )
    started = [own.teacher for own in on_servers.values() if not own.teacher.teacher_urls]
    _refuse_shared(Counter(gpu for own in started for gpu in set(own.teacher_gpu_ids)), "teacher-gpu-ids", problems)


def _refuse_shared(uses: Counter[str], key: str, problems: Problems) -> None:
    shared = sorted(value for value, count in uses.items() if count > 1)
    problems.require(not shared, f"--teacher-config: several teachers have {key} {' '.join(shared)}: give each its own")


def check_domains(config: TrainConfig, prompts: PromptSet, problems: Problems) -> None:
    """Check that a teacher scores every prompt; a domain that no prompt has gives a warning."""
    if not config.teachers:
        return
    shares, counts = Shares(config.teachers), prompts.domains()
    files = " ".join(teacher.file for teacher in config.teachers)
    for domain, count in sorted(counts.items()):
        problems.require(
            shares.of(domain),
            f"--teacher-config {files}: no teacher scores the {count} prompts of {_called(domain)}; name it in "
            "`domains` of one, or add a teacher without `domains`, for all that no other names",
        )
    problems.warnings.extend(
        f"--teacher-config: no prompt is of domain {domain!r} (--domain-key {config.data.domain_key})"
        for domain in sorted(shares.named - counts.keys())
    )


def _called(domain: str) -> str:
    return f"domain {domain!r}" if domain else "no domain"


def check_all_scores(
    config: TrainConfig, objective: Objective, prompts: PromptSet, vocab_size: int, problems: Problems
) -> None:
    """Check the stored scores of every teacher that has some."""
    shares, names = Shares(config.teachers), {one.role: one.name for one in config.teachers}
    for role, own in config.by_teacher.items():
        if own.teacher.teacher_placement != "file":
            continue

        def scores_domain(domain: str, role: str = role) -> bool:
            return not config.teachers or names[role] in shares.of(domain)

        with problems.named(config.file_of(role)):
            check_teacher_scores(own, objective, prompts, vocab_size, problems, scores_domain)
