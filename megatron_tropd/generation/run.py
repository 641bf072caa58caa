"""Write what is missing of a job's responses, and report."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Iterator

from megatron_tropd.atomic_files import replacing
from megatron_tropd.cli import ConfigError
from megatron_tropd.data.reading.rows import BadRow
from megatron_tropd.generation.engines import make_writer, server_flags
from megatron_tropd.generation.job import GenerationJob
from megatron_tropd.generation.progress import GenerationProgress
from megatron_tropd.generation.prompts import iterate
from megatron_tropd.generation.settings import Identity, claim, data_digest
from megatron_tropd.generation.store import ResponseStore
from megatron_tropd.generation.task import Task
from megatron_tropd.reporting.lock import RunLock
from megatron_tropd.standard_streams import tell
from megatron_tropd.weights.files.identity import model_identity

REPORT = "report.json"


class NothingKept(ValueError):
    """The work is done, and no response is of use."""

    exit_code = 1


def run(job: GenerationJob) -> None:
    """Write what is missing, and report.

    Raises:
        ConfigError: --save holds something else, or the settings of the servers cannot be used.
        EngineError, GradingError, OSError: the work cannot go on; what was written is kept.
    """
    directory = job.flags.save
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = RunLock(directory / ".lock")
        claim(directory, _identity(job))
    except (OSError, ValueError) as error:
        raise ConfigError([str(error)]) from error
    store = ResponseStore(
        directory, job.maker, num_prompts=job.survey.num_prompts, samples=job.flags.n_samples_per_prompt,
        shard_size=max(1, job.flags.responses_per_shard // job.flags.n_samples_per_prompt),
    )  # fmt: skip
    tasks = _missing(job, store)
    if (first := next(tasks, None)) is not None:
        _write(job, store, itertools.chain([first], tasks))
    _report(job, store)
    lock.release()


def _identity(job: GenerationJob) -> Identity:
    flags = job.flags
    return Identity(
        hf_checkpoint=job.maker.model, model=model_identity(job.model.path), prompt_data=tuple(flags.prompt_data),
        data=data_digest(job.files, job.encoder), num_prompts=job.survey.num_prompts,
        n_samples_per_prompt=flags.n_samples_per_prompt, temperature=flags.temperature, top_p=flags.top_p,
        max_response_length=flags.max_response_length, stop_token_ids=job.stop_token_ids, seed=flags.seed,
        keep=flags.keep, grader=flags.grader if flags.keep == "right" else "", answer_pattern=flags.answer_pattern,
        lenient_grading=flags.lenient_grading,
        responses_per_shard=flags.responses_per_shard,
        engine=flags.engine,
        dtype=job.dtype,
        sglang_flags=server_flags(flags),
    )  # fmt: skip


def _missing(job: GenerationJob, store: ResponseStore) -> Iterator[Task]:
    """Yield what has to be written, in the order of the prompts."""
    for prompt in iterate(job.files, job.encoder):
        if not isinstance(prompt, BadRow) and (samples := store.missing(prompt)):
            yield Task(number=prompt.number, random_uid=prompt.random_uid, token_ids=prompt.token_ids, samples=samples)


def _write(job: GenerationJob, store: ResponseStore, tasks: Iterable[Task]) -> None:
    writer = make_writer(job)
    try:
        with GenerationProgress(job.total, store.num_stored, sys.stderr) as progress:
            for written in writer.write(tasks):
                store.add(written)
                progress.add(
                    responses=len(written),
                    tokens=sum(len(each.token_ids) for each in written),
                    cut=sum(each.finish == "length" for each in written),
                )
    finally:
        writer.close()


def _report(job: GenerationJob, store: ResponseStore) -> None:
    """Write report.json and say what there is.

    Raises:
        NothingKept: no response was kept.
    """
    counts = store.counts
    with replacing(job.flags.save / REPORT) as path:
        numbers = {
            "prompts": job.survey.num_prompts, "bad_rows": job.survey.bad_rows, **dataclasses.asdict(counts)
        }  # fmt: skip
        path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    right = f", {counts.right:,} of {counts.graded:,} graded are right" if counts.graded else ""
    unreadable = f", {counts.unreadable:,} could not be read by a run" if counts.unreadable else ""
    tell(
        f"{counts.responses:,} responses to {job.survey.num_prompts:,} prompts, {counts.tokens:,} tokens; "
        f"{counts.finished:,} finished{right}{unreadable}; {counts.kept:,} kept (--keep {job.flags.keep}) in "
        f"{job.flags.save}/data",
        sys.stdout,
    )
    if not counts.kept:
        raise NothingKept(
            f"no response was kept: all {counts.responses:,} are in {job.flags.save}/dropped; "
            "raise --max-response-length, or look at them and give another --keep (with another --save)"
        )
