"""One run of the command: check everything, serve the model, run the benchmarks, write the tables."""

from __future__ import annotations

import argparse
import contextlib
import functools
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_tropd.atomic_files import write_text
from megatron_tropd.benchmarks import flags, tables
from megatron_tropd.benchmarks.data_files import check_nltk_data, read_questions
from megatron_tropd.benchmarks.job import Job, RunnerFailed, check_environment, run_job
from megatron_tropd.benchmarks.model_source import EvaluatedModel, check_text, from_hf, from_megatron, from_run
from megatron_tropd.benchmarks.protocol import BENCHMARKS, Protocol
from megatron_tropd.benchmarks.results import (
    keep_config,
    read_results,
    read_scores,
    write_scores,
    write_summary,
)
from megatron_tropd.benchmarks.serving import Served, given, passed_flags, server_settings, started
from megatron_tropd.models.hf_config import ModelShape, load_hf_config
from megatron_tropd.parallel import platform
from megatron_tropd.reporting.lock import RunLock
from megatron_tropd.sandbox import check as check_sandbox
from megatron_tropd.sglang.settings import ServerSettings, load_keys
from megatron_tropd.standard_streams import print_result, tell

T = TypeVar("T")

_SAY_EVERY_S = 10.0
CONVERTED = "hf_checkpoint"
"""Folder in the output directory for a converted model that need not be kept."""


def say(line: str) -> None:
    """Print a line for people."""
    tell(line)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What a run does, once all checks have passed."""

    args: argparse.Namespace
    protocol: Protocol
    benchmarks: dict[str, dict[str, Any]]
    """Benchmark -> what its scores belong to."""
    model: EvaluatedModel | None
    """None: servers that run already have it."""
    settings: ServerSettings | None
    """Of the servers to start."""
    shape: ModelShape | None
    """Of the model to serve."""
    server_flags: tuple[str, ...]
    """Those for SGLang that the user gave."""


def run(args: argparse.Namespace, server_flags: Sequence[str]) -> None:
    """Run the benchmarks that are not complete in the output directory, and write its tables.

    Raises:
        ValueError, OSError: a flag, a file or a model cannot be used; nothing was started.
        EngineError: no server answers.
        RunnerFailed: the work failed; what was answered is kept.
    """
    with contextlib.ExitStack() as stack:
        plan = _plan(args, server_flags, stack)
        connect = functools.partial(_connect, plan, stack)
        served = connect() if args.server_urls else None
        identity, name = _identity(plan, served)
        keep_config(args.output, name=name, model=identity, benchmarks=plan.benchmarks)
        todo = tuple(name for name in args.benchmarks if read_scores(args.output, name) is None)
        try:
            if todo:
                _run_benchmarks(plan, todo, served or connect())
            _write_tables(args)
        except OSError as error:  # a full disk, and no flag
            raise RunnerFailed(str(error)) from error
    if args.load and not args.save_hf:
        shutil.rmtree(args.output / CONVERTED, ignore_errors=True)


def _plan(args: argparse.Namespace, server_flags: Sequence[str], stack: contextlib.ExitStack) -> _Plan:
    """Check everything that can be checked before something starts; all that is wrong is one message.

    ``stack`` gets the lock of the output directory."""
    problems: list[str] = []

    def attempt(check: Callable[[], T]) -> T | None:
        try:
            return check()
        except (OSError, ValueError) as error:
            problems.append(str(error))
            return None

    attempt(lambda: _check_choices(args, server_flags))
    protocol = attempt(lambda: flags.protocol_of(args))
    benchmarks = attempt(lambda: _check_data(args, protocol or Protocol()))
    attempt(lambda: check_environment(args.evalscope_python))
    if not problems:
        attempt(lambda: stack.enter_context(_locked(args.output)))
    model = attempt(lambda: _find_model(args, server_flags)) if not problems or not args.load else None
    settings = attempt(lambda: _settings(args, server_flags, model)) if model else None
    shape = attempt(lambda: ModelShape.of_config(load_hf_config(model.path), str(model.path))) if model else None
    if problems:
        raise ValueError("\n".join(problems))
    assert protocol is not None and benchmarks is not None
    return _Plan(
        args=args, protocol=protocol, benchmarks=benchmarks, model=model, settings=settings, shape=shape,
        server_flags=tuple(server_flags),
    )  # fmt: skip


def _check_choices(args: argparse.Namespace, server_flags: Sequence[str]) -> None:
    """Check that the flags say one model and one kind of servers."""
    sources = ("hf_checkpoint", "load", "run_dir", "server_urls")
    found = [f"--{flag.replace('_', '-')}" for flag in sources if getattr(args, flag)]
    if len(found) != 1:
        raise ValueError(
            "expected one of --hf-checkpoint, --load, --run-dir, --server-urls; found " + (", ".join(found) or "none")
        )
    for flag, of in (("iteration", "load"), ("save_hf", "load"), ("served_model", "server_urls")):
        if getattr(args, flag) and not getattr(args, of):
            raise ValueError(f"--{flag.replace('_', '-')} belongs to --{of.replace('_', '-')}, which was not given")
    if server_flags and args.server_urls:
        raise ValueError(f"--sglang-{server_flags[0][2:]} is for servers that are started here, not for --server-urls")


def _check_data(args: argparse.Namespace, protocol: Protocol) -> dict[str, dict[str, Any]]:
    """Read all questions, and return what belongs to each benchmark's scores."""
    found, problems = {}, []
    for name in args.benchmarks:
        try:
            questions = read_questions(name, args.data_dir, protocol)
            if name == "ifbench":
                check_nltk_data(args.data_dir)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        count, expected = len(questions.ids), BENCHMARKS[name].num_questions
        if protocol.limit is None and expected is not None and count != expected:
            say(f"warning: {name} has {count} questions in {args.data_dir / name}; the paper's set has {expected}")
        found[name] = {**protocol.settings_of(name), "num_questions": count, "data_sha256": questions.sha256}
    if problems:
        raise ValueError("\n".join(problems))
    if any(BENCHMARKS[name].kind == "code" for name in args.benchmarks) and (weak := check_sandbox()):
        raise ValueError(
            "generated programs cannot be confined on this machine: "
            + "; ".join(weak)
            + ".  Leave out livecodebench_v6"
        )
    return found


def _find_model(args: argparse.Namespace, server_flags: Sequence[str]) -> EvaluatedModel | None:
    """Return the model to serve, converted if need be; None where servers have it already."""
    if args.load:
        save = args.save_hf or args.output / CONVERTED
        model, flag = from_megatron(args.load, args.iteration, save, say, keeps=args.save_hf is not None), "--load"
    elif args.run_dir:
        model, flag = from_run(args.run_dir), "--run-dir"
    elif args.hf_checkpoint:
        model, flag = from_hf(args.hf_checkpoint, "--hf-checkpoint"), "--hf-checkpoint"
    else:
        return None
    check_text(model, flag, needs_template="--sglang-chat-template" not in passed_flags(server_flags))
    return model


def _settings(args: argparse.Namespace, server_flags: Sequence[str], model: EvaluatedModel) -> ServerSettings:
    cuda = platform.is_cuda()
    return server_settings(
        model.path, output=args.output.absolute(), python=Path(args.sglang_python or sys.executable).absolute(),
        num_servers=args.num_servers, tp_size=args.sglang_tp_size, host=args.sglang_host,
        keys=load_keys(file=args.sglang_key_file), dtype=args.dtype or ("bfloat16" if cuda else "float32"),
        flags=server_flags, cuda=cuda, start_timeout_s=args.sglang_start_timeout,
    )  # fmt: skip


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keep other commands out of the output directory."""
    output.mkdir(parents=True, exist_ok=True)
    lock = RunLock(output / "benchmark.lock")
    try:
        yield
    finally:
        lock.release()


def _connect(plan: _Plan, stack: contextlib.ExitStack) -> Served:
    """Return servers that answer; those that are started live until ``stack`` is left."""
    if plan.settings is None or plan.shape is None:
        args = plan.args
        return given(args.server_urls, args.served_model, load_keys(file=args.sglang_key_file))
    say(f"starting {plan.settings.num_servers} servers; their logs are in {plan.settings.log_dir}")
    return stack.enter_context(started(plan.settings, plan.shape.max_positions))


def _identity(plan: _Plan, served: Served | None) -> tuple[dict[str, Any], str]:
    """Return what must stay the same when the run goes on, and the model's name for tables."""
    if plan.model is not None:
        assert plan.settings is not None
        identity = {**plan.model.identity, "dtype": plan.settings.dtype, **passed_flags(plan.server_flags)}
        return identity, plan.args.model_name or plan.model.name
    assert served is not None
    return {"served_model": served.model}, plan.args.model_name or served.model


def _run_benchmarks(plan: _Plan, todo: tuple[str, ...], served: Served) -> None:
    args = plan.args
    job = Job(
        benchmarks=todo, data_dir=args.data_dir, output=args.output, protocol=plan.protocol,
        concurrency=args.concurrency * len(served.urls), code_at_once=args.code_at_once,
        response_timeout_s=args.response_timeout,
    )  # fmt: skip
    progress = _Progress()
    for result in run_job(args.evalscope_python.absolute(), job, served, progress.show):
        write_scores(args.output, result)
        say(f"{result.benchmark}: {tables.percent(result.estimate())}")


def _write_tables(args: argparse.Namespace) -> None:
    """Write summary and table of all complete benchmarks, and print them."""
    results = read_results(args.output)
    write_summary(args.output, list(results.values()))
    run_tables = [tables.metrics_table(results), tables.models_table([args.output], args.paper_setting)]
    write_text(args.output / "table.txt", "\n\n".join(table.text() for table in run_tables) + "\n")
    write_text(args.output / "table.md", "\n\n".join(table.markdown() for table in run_tables) + "\n")
    print_result((args.output / "table.txt").read_text(encoding="utf-8"), end="")
    failed = {name: sum(q.grading_errors for q in result.questions) for name, result in results.items()}
    for name, count in failed.items():
        if count:
            log = args.output / "runner.log"
            say(f"warning: {name}: {count} responses could not be graded and count as wrong; see {log}")


class _Progress:
    """Lines with a rate and the time left, not too often."""

    def __init__(self) -> None:
        self._name, self._first, self._begun, self._said = "", 0, 0.0, 0.0

    def show(self, name: str, done: int, total: int) -> None:
        """Say how far a benchmark is."""
        now = time.monotonic()
        if name != self._name:
            self._name, self._first, self._begun, self._said = name, done, now, 0.0
        if now - self._said < _SAY_EVERY_S:
            return
        self._said = now
        rate = (done - self._first) / (now - self._begun) if now > self._begun else 0.0
        left = f", {rate:.2f} a second, {(total - done) / rate / 60:.0f} min left" if rate else ""
        say(f"{name}: {done} of {total} responses{left}")
