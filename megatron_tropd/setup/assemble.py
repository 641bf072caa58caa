"""Build the parts of a run from a checked run spec."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_tropd.config import TrainConfig
from megatron_tropd.data.prompt_source import PromptSource
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.roles import job_of_environment
from megatron_tropd.parallel.stop_request import StopRequest
from megatron_tropd.reporting.progress.progress import NullProgress, Progress
from megatron_tropd.reporting.rollout_samples import TokenText
from megatron_tropd.reporting.sinks import Sinks
from megatron_tropd.rollout.engine_pool import Export
from megatron_tropd.setup.engines import make_engines
from megatron_tropd.setup.model_health import check_scorers
from megatron_tropd.setup.models import make_student
from megatron_tropd.setup.run_files import RunFiles, open_files
from megatron_tropd.setup.run_spec import RunSpec
from megatron_tropd.setup.same_configuration import check_same_configuration
from megatron_tropd.setup.same_run import Origin, find_origin
from megatron_tropd.setup.scorers import Keeping, make_scorers
from megatron_tropd.setup.stored_scores import check_teacher_digest
from megatron_tropd.setup.teacher_world import tell_teachers
from megatron_tropd.teacher.kept_scores import ScoreStore
from megatron_tropd.training.checkpointing import Checkpoints
from megatron_tropd.training.evaluations import Evaluations
from megatron_tropd.training.guard import Guard
from megatron_tropd.training.parity import ParityAlarm, Probes, probe_sequences
from megatron_tropd.training.rewarding import Rewarder
from megatron_tropd.training.run import Run
from megatron_tropd.training.run_logger import RolloutReader, RunLogger
from megatron_tropd.training.spool import FOLDER, Spool
from megatron_tropd.training.stopping import Stopping
from megatron_tropd.training.stream import Pending, Stream
from megatron_tropd.training.student import Student, params_dtype
from megatron_tropd.training.weights_digest import weights_digest
from megatron_tropd.types import Rollout
from megatron_tropd.weights.coordinates.parameters import local_parameters
from megatron_tropd.weights.transport.hf_export import HfExporter

Decode = Callable[[Sequence[int]], str]
"""Turns token ids into text, without special tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """A run, the step it starts from, and the files to close after it."""

    run: Run
    start_step: int
    files: RunFiles


def make_rewarder(spec: RunSpec, decode: Decode) -> Rewarder | None:
    """Make the rewarder; None for an objective that needs no rewards."""
    if spec.reward_function is None:
        return None
    return Rewarder(
        function=spec.reward_function,
        decode=decode,
        prompts=spec.data.prompts.by_uid,
        grader=spec.grader,
    )


def make_export(student: Student, arch: Architecture, config: TrainConfig) -> Export:
    """Return a function that exports the student's weights by HF name.  The export is planned once; each call is
    collective over the world."""
    exporter = HfExporter(arch, student.groups.layout, dist.get_rank(), dtype=params_dtype(config))
    return lambda: exporter.export(local_parameters(student.model), student.groups.world)


def make_token_text(spec: RunSpec) -> TokenText:
    """Return how the run's token ids become text."""
    decode = spec.tokenizer.decode
    return TokenText(
        decode=partial(decode, skip_special_tokens=True),
        name=lambda token: str(decode([token], skip_special_tokens=False)),
    )


def make_run_logger(spec: RunSpec, text: TokenText, files: RunFiles, progress: NullProgress) -> RunLogger:
    """Make the logger of the run's steps, evaluations and sampled rollouts.  In supervised finetuning there are no
    rollouts: the responses are those of the data, and nothing about them is logged."""
    config = spec.config
    sampled = spec.objective.needs.rollouts
    reader = RolloutReader(
        text=text,
        prompts=spec.data.prompts.by_uid if sampled else {},
        grader=spec.grader,
    )
    return RunLogger(
        files.directory,
        files.sinks,
        progress,
        reader,
        rollout_interval=config.logging.rollout_log_interval if sampled else 0,
        last_step=config.training.train_iters,
    )


def assemble(
    spec: RunSpec, request: StopRequest | None = None, *, launched_s: float | None = None, writes: bool = True
) -> Assembled:
    """Build all parts of the run, resumed from its checkpoint if there is one; collective over the world.

    ``request`` is where a signal to this rank asks the run to stop; ``launched_s`` on the clock of time.monotonic is
    when its time began (--exit-duration-in-mins), now by default.  Without ``writes`` the run has no directory and no
    sinks, and shows nothing.
    """
    config = spec.config
    job = job_of_environment(spec.roles)
    stopping = Stopping(
        config, request or StopRequest(), time.monotonic() if launched_s is None else launched_s,
        partial(tell_teachers, job, config.parallel.distributed_timeout_s),
    )  # fmt: skip
    check_same_configuration(config, job)
    student = spec.models.student
    checkpoints = Checkpoints(config, student.arch, student.hf_dir, student.source)
    origin = find_origin(spec, checkpoints)
    for teacher in spec.models.teachers:
        if teacher.placement == "file":
            check_teacher_digest(teacher.config, origin.record.models[teacher.role].digest)
    files = open_files(config, origin.start_step) if writes else RunFiles(directory=None, sinks=Sinks({}))
    with ExitStack() as on_failure:
        on_failure.callback(files.close)
        if writes:
            stopping.begin()
        run = _make_run(spec, checkpoints, stopping, files, origin, on_failure)
        on_failure.pop_all()
    return Assembled(run=run, start_step=origin.start_step or 0, files=files)


def _make_run(
    spec: RunSpec, checkpoints: Checkpoints, stopping: Stopping, files: RunFiles, origin: Origin, on_failure: ExitStack
) -> Run:
    config, objective, models = spec.config, spec.objective, spec.models
    student = make_student(spec)
    source = PromptSource(spec.data.prompts, config.training.seed)
    pending = None
    if origin.start_step is not None:
        pending = checkpoints.resume(student, source, new_prompts=origin.new_prompts)
    export = make_export(student, models.student.arch, config)
    probes = Probes(sequences=probe_sequences(spec.data.prompts), vocab_size=models.student.arch.vocab_size)
    engines = None
    if objective.needs.rollouts or spec.data.eval_prompts:  # servers start while other models load
        engines = make_engines(spec, student, export, probes.sequences)
        on_failure.callback(engines.close)
    progress = _progress(config, files, origin.start_step or 0)
    kept_scores = _score_store(spec, progress)
    keeping = Keeping(store=kept_scores, record=origin.record) if kept_scores else None
    scorers = make_scorers(spec, student.groups, on_failure, keeping)
    teacher, reference = scorers.teacher, scorers.reference
    whole_vocabulary = objective.needs.divergence or config.logging.gradient_diagnostics_interval
    table_rows = student.model.vocab_size
    text = make_token_text(spec)
    health = check_scorers(spec, scorers.by_role, origin)
    checkpoints.record, checkpoints.message = health.record, progress.message
    if files.directory is not None:
        files.directory.message = progress.message
    for note in (*files.notes, *origin.notes, *health.warnings):
        progress.message(note)
    logger = make_run_logger(spec, text, files, progress)
    held_out = spec.data.eval_prompts or ()
    rollouts_from = engines if objective.needs.rollouts else None
    stream = Stream(
        config, source, rollouts_from, [scoring for scoring in (teacher, reference) if scoring],
        report_top_k=objective.needs.student_top_k, spool=_spool(config, student, progress) if rollouts_from else None,
        kept_scores=kept_scores,
    )  # fmt: skip
    if pending is not None:
        _go_on_with(pending, stream, student, source, spec)
    return Run(
        config=config,
        source=source,
        student=student,
        stream=stream,
        teacher=teacher,
        teacher_weight=teacher.scorer.output_rows(student.groups, table_rows) if teacher and whole_vocabulary else None,
        reference=reference,
        rewarder=make_rewarder(spec, text.decode),
        objective=objective,
        engines=engines,
        export=export,
        checkpoints=checkpoints,
        stopping=stopping,
        guard=Guard(config.training, progress.message),
        parity=ParityAlarm(config.parity_limit, config.engine.on_parity),
        probes=probes,
        evaluations=Evaluations(config, held_out, spec.tokenizer, spec.grader, logger, progress),
        logger=logger,
        progress=progress,
    )


def _spool(config: TrainConfig, student: Student, progress: NullProgress) -> Spool | None:
    """Make what keeps finished rollouts; None where nobody could use them: under --rollout-lag the weights that wrote
    them are gone when a run resumes."""
    if not config.rollout.keep_unfinished_rollouts or config.rollout.rollout_lag:
        return None
    return Spool(
        Path(config.logging.run_dir) / FOLDER, partial(weights_digest, student),
        f"{config.engine.rollout_engine} {params_dtype(config)}", progress.message,
    )  # fmt: skip


def _score_store(spec: RunSpec, progress: NullProgress) -> ScoreStore | None:
    """Make what keeps the scores of unfinished batches; None where the student writes no rollouts."""
    config = spec.config
    if not config.rollout.keep_unfinished_rollouts or not spec.objective.needs.rollouts:
        return None
    return ScoreStore(Path(config.logging.run_dir) / FOLDER, progress.message)


def _go_on_with(pending: Pending, stream: Stream, student: Student, source: PromptSource, spec: RunSpec) -> None:
    """Train next on the batch that the checkpoint holds, if it can be used: one that older weights wrote is for
    --rollout-lag only, and it must have the ids that the method asks for, and prompts that are still there.  Otherwise
    prompts are taken again in its place."""
    config, prompts, top_k = spec.config, spec.data.prompts.by_uid, spec.objective.needs.student_top_k
    fresh = all(rollout.weight_version[0] == student.version for rollout in pending.rollouts)
    whole = all(_width(rollout) == top_k or not rollout.logprobs for rollout in pending.rollouts)
    known = all(rollout.prompt_uid in prompts for rollout in pending.rollouts)
    if (fresh or config.rollout.rollout_lag) and whole and known:
        stream.resume(pending)
    else:
        source.consumed -= config.rollout.rollout_batch_size


def _width(rollout: Rollout) -> int:
    return 0 if rollout.topk_ids is None else rollout.topk_ids.shape[1]


def _progress(config: TrainConfig, files: RunFiles, start_step: int) -> NullProgress:
    if files.directory is None:
        return NullProgress(start_step)
    logging = config.logging
    return Progress(
        config.training.train_iters, start_step, logging.log_interval,
        run_dir=Path(logging.run_dir), heartbeat_interval=logging.heartbeat_interval,
    )  # fmt: skip


def close(assembled: Assembled) -> None:
    """Close the files, sinks and engines, and free the student's memory."""
    assembled.run.checkpoints.close()
    assembled.run.student.close()
    try:
        assembled.files.close()
    finally:
        for scoring in (assembled.run.teacher, assembled.run.reference):
            if scoring is not None:
                scoring.scorer.close()
        if assembled.run.engines is not None:
            assembled.run.engines.close()
