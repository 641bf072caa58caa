"""Compare a run with the checkpoint it resumes from, so that no run becomes another experiment without a word.

Every setting is in one of three groups.  Method, data, models, rewards and seed make an experiment: a change is refused
without --allow-changed-run.  Everything else may change and is shown, one line per flag: layout, engines, intervals,
length, optimizer (but not the form of its state).  Where a run writes and reads its checkpoints is not compared.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_tropd.checkpoints.metadata import CheckpointError
from megatron_tropd.checkpoints.run_record import ModelRecord, RunRecord
from megatron_tropd.cli import ConfigError, sections, to_flags
from megatron_tropd.config import TrainConfig
from megatron_tropd.data.prompts import PromptSet
from megatron_tropd.parallel.fail_together import on_rank_zero
from megatron_tropd.reporting.environment import git_state, package_version
from megatron_tropd.reporting.redaction import redact_mapping
from megatron_tropd.reporting.run_directory import plain
from megatron_tropd.setup.model_digests import model_digests
from megatron_tropd.setup.run_spec import RunSpec
from megatron_tropd.teacher_config import role_of
from megatron_tropd.teacher_files import OF_THE_FILE, settings_of_teachers
from megatron_tropd.training.checkpointing import Checkpoints

EXPERIMENT_SECTIONS = ("data", "objective", "method", "reward")
CHECKS_OF_DATA = ("data-cache-path", "min-response-share")
"""Flags of the data that change no prompt."""
NOT_COMPARED = (
    "run-dir", "save", "load", "emergency-save", "exit-on-missing-checkpoint", "fallback-previous", "allow-changed-run",
    "teacher-config",
)  # fmt: skip
"""Of --teacher-config what the files say is compared, not where they are."""
MODEL_FLAGS = {
    "hf-checkpoint": "student", "pretrained-checkpoint": "student",
    "teacher-hf-checkpoint": "teacher", "teacher-load": "teacher",
    "reference-hf-checkpoint": "reference", "reference-load": "reference",
}  # fmt: skip
"""The role of the model that a flag names."""
PATHS = (*MODEL_FLAGS, "prompt-data", "eval-data")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a run starts from."""

    start_step: int | None
    """None without a checkpoint."""
    record: RunRecord
    """This launch, without the log-probabilities of its models."""
    before: RunRecord | None
    """The run that wrote the checkpoint; None without a checkpoint, or with one of an older version."""
    new_prompts: bool = False
    """Whether --prompt-data names other files than the checkpoint's run, which then start at their beginning."""
    notes: tuple[str, ...] = ()
    """What changed, for people."""


def find_origin(spec: RunSpec, checkpoints: Checkpoints) -> Origin:
    """Find the checkpoint to resume from, and compare its run with this launch.  Collective over the world.

    Raises:
        ConfigError: on every rank: the launch is another experiment, and --allow-changed-run is not given; a weight
            file cannot be read; the record of the run is damaged.
        CheckpointError: on every rank: the tracker is damaged.
    """
    config = spec.config
    origin = checkpoints.resume_origin()
    digests = model_digests(spec.models)
    record = on_rank_zero(lambda: describe_run(spec, digests))
    if origin is None:
        return Origin(start_step=None, record=record, before=None)
    try:
        before = checkpoints.resume_record()
    except CheckpointError as error:  # on every rank
        raise ConfigError([str(error)]) from error
    where = f"{origin.directory}, step {origin.step}"
    newer = (origin.note,) if origin.note else ()
    if before is None:
        note = f"the checkpoint ({where}) does not record its settings; whether they changed is not known"
        return Origin(start_step=origin.step, record=record, before=None, new_prompts=True, notes=(*newer, note))
    _check_optimizer(before, record, where)
    changes = compare(before, record)
    if changes.refused and not config.checkpoint.allow_changed_run:
        refused = "".join(f"\n      {line}" for line in changes.refused)
        raise ConfigError(
            [
                f"the checkpoint ({where}) belongs to another experiment; changed since it was saved:{refused}\n"
                "    restore these, or start a new run with another --run-dir (from its weights: give the checkpoint "
                "directory to --pretrained-checkpoint), or pass --allow-changed-run to go on as another experiment"
            ]
        )
    lines = [*changes.refused, *changes.shown]
    changed = (f"changed since the checkpoint ({where}):" + "".join(f"\n  {line}" for line in lines),) if lines else ()
    new_prompts = before.settings.get("prompt-data") != record.settings["prompt-data"]
    notes = (*newer, *changed)
    return Origin(start_step=origin.step, record=record, before=before, new_prompts=new_prompts, notes=notes)


def _check_optimizer(before: RunRecord, now: RunRecord, where: str) -> None:
    """Compare what Megatron's optimizers save: each of the three forms is read by its own kind only.

    Raises:
        ConfigError: the checkpoint's is another than this launch's.
    """
    old, new = _optimizer_form(before), _optimizer_form(now)
    if old != new:
        raise ConfigError(
            [
                f"the optimizer state of the checkpoint ({where}) is that of {old}, and {new} cannot read it: give the "
                "former, or start a new run with another --run-dir from its weights (give the checkpoint directory to "
                "--pretrained-checkpoint)"
            ]
        )


def _optimizer_form(record: RunRecord) -> str:
    """Return the flags that decide in which form the optimizer's state is saved."""
    if record.settings.get("use-distributed-optimizer"):
        return "--use-distributed-optimizer"
    return "--no-use-distributed-optimizer " + ("--bf16" if record.settings.get("bf16") else "--no-bf16")


def describe_run(spec: RunSpec, digests: dict[str, str]) -> RunRecord:
    """Return what a run is made of.  ``digests`` are those of the models, by role."""
    state = git_state(Path(__file__).resolve().parent)
    version = package_version("megatron-tropd") or "not installed"
    settings = settings_of(spec.config)
    if spec.config.teachers:  # which teacher scores what
        counts = sorted(spec.data.prompts.domains().items())
        settings["teacher-config prompts of domains"] = [f"{domain} {count}" for domain, count in counts]
    return RunRecord(
        settings=settings,
        code=f"{version}, commit {state['sha'][:12]}" if state else version,
        prompts=spec.data.prompts.digest,
        answers=_answers_digest(spec.data.prompts) if spec.reward_function else "",
        models={role: ModelRecord(digest=digest) for role, digest in digests.items()},
    )


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """Return the settings by flag name in plain types: paths resolved, secrets hidden."""
    settings = {**to_flags(config), **settings_of_teachers(config.teachers)}
    flags: dict[str, Any] = plain(redact_mapping(settings))
    return {name: _resolved(value) if name.split()[-1] in PATHS else value for name, value in flags.items()}


def _resolved(value: Any) -> Any:
    if isinstance(value, list):
        return [_resolved(path) for path in value]
    return str(Path(value).resolve()) if value and Path(value).exists() else value


def _answers_digest(prompts: PromptSet) -> str:
    state = hashlib.sha256()
    for uid, answer, grader in prompts.answers():
        state.update(json.dumps([uid, answer, *[grader] * bool(grader)]).encode())
    return state.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Lines that say what changed: refused without --allow-changed-run, or only shown."""

    refused: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)


def compare(before: RunRecord, now: RunRecord) -> Changes:
    """Return what changed between two launches of a run."""
    changes, defaults = Changes(), settings_of(TrainConfig())
    experiment = _experiment_flags(now) | _experiment_flags(before)
    touched = set()
    for name in {**now.settings, **before.settings}:
        # A flag that the other version did not have had the effect of its default.
        old, new = (side.settings.get(name, defaults.get(name)) for side in (before, now))
        if old == new or name in NOT_COMPARED:
            continue
        touched.add(name)
        line = f"--{name}: {_show(old)} -> {_show(new)}"
        if (role := _role_of(name)) is not None:
            _judge_model(line, role, before, now, changes)
        elif name == "prompt-data":
            same = before.prompts == now.prompts
            (changes.shown if same else changes.refused).append(line + " (the same prompts)" * same)
        else:
            (changes.refused if name in experiment else changes.shown).append(line)
    _compare_contents(before, now, touched, changes)
    if before.code != now.code:
        changes.shown.append(f"code: {before.code} -> {now.code}")
    return changes


def _role_of(name: str) -> str | None:
    """Return the role of the model that a setting names; None for any other setting."""
    *teacher, key = name.split()  # "teacher-config math teacher-load" is of one of several
    role = MODEL_FLAGS.get(key)
    return role_of(teacher[1]) if role and teacher else role


def _experiment_flags(record: RunRecord) -> set[str]:
    flags = {f.name.replace("_", "-") for name in EXPERIMENT_SECTIONS for f in fields(sections()[name])}
    # How answers are graded counts where the objective learns from rewards.
    graded = {"answer-pattern", "grader", "lenient-grading"} if record.settings.get("reward-function") else set()
    assigned = {name for name in record.settings if name.split()[-1] in OF_THE_FILE}
    return (flags | {"seed"} | graded | assigned) - set(CHECKS_OF_DATA)


def _judge_model(line: str, role: str, before: RunRecord, now: RunRecord, changes: Changes) -> None:
    """A model that moved is the same; one that the objective does not use does not matter."""
    old, new = before.models.get(role), now.models.get(role)
    if old and new and old.digest != new.digest:
        changes.refused.append(line)
    else:
        changes.shown.append(line + (" (the same weights)" if old and new else " (not used)"))


def _compare_contents(before: RunRecord, now: RunRecord, touched: set[str], changes: Changes) -> None:
    """Add what changed in files although their flags did not."""
    for role in now.models.keys() & before.models.keys():
        old, new = before.models[role].digest, now.models[role].digest
        flags = [name for name in now.settings if _role_of(name) == role]
        if old != new and not touched & set(flags):
            named = " ".join(f"--{name} {value}" for name in flags if (value := now.settings[name]))
            changes.refused.append(f"weights of the {role} ({named}): sha256 {old[:12]} -> {new[:12]}")
    data = {f.name.replace("_", "-") for f in fields(sections()["data"])}
    data |= {"objective", "guidance"}  # they say whether responses are read
    what = "the files of --prompt-data"
    if before.prompts != now.prompts and not touched & data:
        changes.refused.append(f"prompts in {what}: sha256 {before.prompts[:12]} -> {now.prompts[:12]}")
    elif before.answers and now.answers and before.answers != now.answers and not touched & data:
        changes.refused.append(f"answers in {what}: sha256 {before.answers[:12]} -> {now.answers[:12]}")


def _show(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "(none)"
    return "(none)" if value is None or value == "" else str(value)
