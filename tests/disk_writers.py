"""Every kind of file that the product writes in one process, as a call of what writes it there.

``write(folder, number, said)`` of a kind writes version ``number`` of its files; it adds what it tells the user to ``said``.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from tests.failing_disk import failing, rule

WRITE = ("write",)
ATOMIC = ("open", "write", "fsync", "rename")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    write: Callable[[Path, int, list[str]], None]
    files: str
    """Glob of the paths that fail, temporary names too."""
    calls: tuple[str, ...] = ATOMIC
    named: str
    """What the error or the warning names; "" where nothing is said."""
    goes_on: bool = False
    """Whether the failure is at most a warning."""
    rewrites: tuple[str, ...] = ()
    """Files that may be new, or gone, after the failure."""


def metrics(folder: Path, number: int, said: list[str]) -> None:
    from tests.test_reporting_files import create, eval_report, step_report

    with create(folder, resume=True) as run:
        run.message = said.append
        for step in (3 * number + 1, 3 * number + 2):
            run.step(step_report(step))
        run.evaluation(eval_report(3 * number + 2))
        assert run.has_evaluation(3 * number + 2), "what waits in memory counts as logged"


def rollouts(folder: Path, number: int, said: list[str]) -> None:
    from megatron_tropd.reporting.rollout_samples import RolloutSample
    from tests.test_reporting_files import create

    sample = RolloutSample(uid=5, sample_index=1, prompt="p", guidance="", response="r", finish="stop")
    with create(folder, resume=True) as run:
        run.message = said.append
        for step in (1, 2):
            run.rollouts(step + 10 * number, [sample])


def run_directory(folder: Path, number: int, said: list[str]) -> None:
    from tests.test_reporting_files import create

    with create(folder, resume=True, lr=float(number)) as run:
        run.teacher("math", {"lr": number})


def heartbeat(folder: Path, number: int, said: list[str]) -> None:
    from megatron_tropd.reporting.progress.heartbeat import Activity, Heartbeat

    beats = Heartbeat(folder, 60.0, lambda: Activity(step=number, phase="", since=time.monotonic()), said.append)
    beats.start()
    beats.stop()


def spool(folder: Path, number: int, said: list[str]) -> None:
    from tests import test_spool

    launch = test_spool._Launch(folder)
    launch.said = said
    launch.spool._say = said.append
    launch.begin()
    for index in (0, 1):
        launch.spool.add({index: test_spool._rollout(index)})


def stopped(folder: Path, number: int, said: list[str]) -> None:
    from megatron_tropd.config import LoggingConfig, TrainConfig
    from megatron_tropd.parallel.stop_request import StopRequest
    from megatron_tropd.training.stopping import Stopping

    Stopping(TrainConfig(logging=LoggingConfig(run_dir=str(folder))), StopRequest(), 0.0).obeyed(f"test {number}")


def stacks(folder: Path, number: int, said: list[str]) -> None:
    from megatron_tropd.parallel.hang_watch import HangWatch

    (folder / str(number)).mkdir(exist_ok=True)
    watch = HangWatch(
        0, 1, [0], lambda: None, lambda: None, silence_s=0, stuck_s=0, folder=folder / str(number), end=lambda error: None
    )  # fmt: skip
    said += [text for text in [watch._write_stacks({0: {"stacks": "x"}})] if "cannot" in text]


def report(folder: Path, number: int, said: list[str]) -> None:
    """With one figure of the ten: drawing takes most of the time."""
    from unittest.mock import patch

    from megatron_tropd.reporting.report.plots import FIGURES
    from megatron_tropd.reporting.report.write import write_report
    from tests.test_reporting_files import create, step_report

    if not (folder / "metrics.jsonl").exists():
        with create(folder) as run:
            run.step(step_report(1))
    with patch.dict(FIGURES, {"loss": FIGURES["loss"]}, clear=True):
        write_report(folder)


@cache
def _student(folder: Path) -> tuple[Any, Any, list[tuple[str, torch.Tensor]], Path]:
    from megatron_tropd.models.hf_config import load_architecture
    from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint
    from megatron_tropd.weights.files.hf_manifest import HfManifest
    from tests.hf_models import read_tensors, save_hf_checkpoint

    directory = folder.parent / "student"
    save_hf_checkpoint(directory, "qwen3", seed=1)
    manifest = HfManifest.of(HfCheckpoint.open(directory))
    return manifest, load_architecture(directory), list(read_tensors(directory).items()), directory


def hf_export(folder: Path, number: int, said: list[str]) -> None:
    from megatron_tropd.weights.files.hf_writer import write_hf_files

    manifest, arch, tensors, _ = _student(folder)
    write_hf_files(folder, manifest, arch, [(name, tensor + number) for name, tensor in tensors], verify=False)


def hf_sidecars(folder: Path, number: int, said: list[str]) -> None:
    from megatron_tropd.weights.files.hf_checkpoint import copy_sidecars

    copy_sidecars(_student(folder)[3], folder / str(number))


def converted(folder: Path, number: int, said: list[str]) -> None:
    from megatron_tropd.checkpoints.conversion.writing import write_plain_files
    from megatron_tropd.weights.files.torch_dist import ChunkFile, make_metadata, write_metadata

    folder = folder / str(number)
    folder.mkdir(exist_ok=True)
    file = ChunkFile(folder, 0)
    try:
        file.add("weight", (0, 0), torch.zeros(300, 300))
        written = file.close()
    finally:
        file.abandon()
    write_metadata(folder, make_metadata([written], {"weight": ((300, 300), torch.float32)}))
    write_plain_files(folder)


def tracker(folder: Path, number: int, said: list[str]) -> None:
    from megatron_tropd.weights.files.hf_writer import replace_text

    replace_text(folder / "latest_checkpointed_iteration.txt", f"{number}\n")


def token_cache(folder: Path, number: int, said: list[str]) -> None:
    from megatron_tropd.data.prompts import load_prompts
    from megatron_tropd.data.tokenizer import load_tokenizer
    from tests.test_data_prompts import FORMAT

    data = folder / f"rows{number}.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"w3 w{n}", "uid": 9 - n}) + "\n" for n in range(9)))
    tokenizer = load_tokenizer(_student(folder)[3])
    load_prompts([str(data)], tokenizer, replace(FORMAT, uid_key="uid", response_key=""), cache_root=folder / "cache")


def journal(folder: Path, number: int, said: list[str]) -> None:
    from megatron_tropd.generation.journal import Journal, Written

    file = Journal(folder / "journal.jsonl")
    file.append([Written(number=number, sample=0, token_ids=(1, 2), finish="stop")])
    assert [written.number for written in file.read()][-1] == number


def responses(folder: Path, number: int, said: list[str]) -> None:
    from megatron_tropd.generation.rows import ResponseRow
    from megatron_tropd.generation.store import ResponseStore

    row = ResponseRow(
        uid="1/0", prompt_uid="1", sample=0, prompt="p", response=str(number), answer=None, grader=None, domain="",
        tools=None, finish="stop", right=None, response_ids=(1,), num_tokens=1, model="m", fault=None,
    )  # fmt: skip
    ResponseStore(folder, None, num_prompts=1, samples=1, shard_size=1)._write(0, "data", [row])


def stored_scores(folder: Path, number: int, said: list[str]) -> None:
    from megatron_tropd.teacher.stored.files import shard_path, write_shard
    from megatron_tropd.types import TeacherScores

    write_shard(shard_path(folder, 0), [(bytes(16), TeacherScores(logprob=torch.full((5,), -float(number))))])


def manifest(folder: Path, number: int, said: list[str]) -> None:
    from megatron_tropd.teacher.stored.files import Manifest

    Manifest(teacher=str(number), top_k=0, vocab_size=9, entropy=False).write(folder)


def benchmark_scores(folder: Path, number: int, said: list[str]) -> None:
    from megatron_tropd.benchmarks.results import QuestionScores, Result, write_scores

    question = QuestionScores(
        benchmark="aime24", question=str(number), scores={"acc": [1.0]}, finish=["stop"], tokens=[3]
    )
    write_scores(folder, Result(benchmark="aime24", questions=(question,)))


def evaluation(folder: Path, number: int, said: list[str]) -> None:
    """``tropd-evaluate --output``, whose error is a message and exit code 2."""
    import contextlib
    import io

    from megatron_tropd import evaluate

    data = folder.parent / "eval.jsonl"
    data.write_text(json.dumps({"prompt": "w3 w4", "answer": "w5"}) + "\n")
    argv = ["--hf-checkpoint", str(_student(folder)[3]), "--eval-data", str(data), "--device", "cpu",
            "--max-response-length", "2", "--decodings", "greedy", "--output", str(folder / f"scores{number}.json")]  # fmt: skip
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = evaluate.main(argv)
    if code:
        assert code == 2, code
        raise OSError(errors.getvalue().removeprefix("error: "))


def prepared_prompts(folder: Path, number: int, said: list[str], name: str = "prompts") -> None:
    """``tools/prepare_prompts.py``, whose error is a message and exit code 1."""
    import contextlib
    import io

    from tools.prepare_prompts import main

    data = folder.parent / "questions.jsonl"
    data.write_text(json.dumps({"prompt": [{"role": "user", "content": "What is 1 + 1?"}]}) + "\n")
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(["--prompt-data", str(data), "--save", str(folder / name.replace("prompts", f"prompts{number}"))])
    if code:
        assert code == 1, code
        raise OSError(errors.getvalue().splitlines()[-1])


RUN_DIRECTORY = ("config.yaml", "env.json", "teachers/math.yaml", "run.lock")
"""Written one after the other: what came before the one that fails is new."""
KINDS: dict[str, Kind] = {
    "metrics": Kind(
        write=metrics, files="*/metrics.jsonl", calls=("open", "write"), named="metrics.jsonl", goes_on=True,
        rewrites=("metrics.jsonl", "env.json"),
    ),
    "rollouts": Kind(
        write=rollouts, files="*/rollouts/*step_*", named="jsonl", goes_on=True, rewrites=("env.json",)
    ),
    "heartbeat": Kind(
        write=heartbeat, files="*/folder/*heartbeat*", named="heartbeat.json", goes_on=True, rewrites=("heartbeat.json",)
    ),
    "spool": Kind(write=spool, files="*.0.*", calls=("open", "write"), named="not kept", goes_on=True),
    "stopped": Kind(
        write=stopped, files="*/stopped", calls=("open", "write"), named="", goes_on=True, rewrites=("stopped",)
    ),
    "stacks": Kind(write=stacks, files="*/hang_*", calls=("open", "write"), named="hang_", goes_on=True),
    **{
        name: Kind(
            write=run_directory, files=f"*/folder/*{name}*", named=name, calls=("write", "open", "rename"),
            rewrites=tuple(other for other in RUN_DIRECTORY if other != name),
        )
        for name in ("config.yaml", "env.json", "math.yaml")
    },
    "run.lock": Kind(
        write=run_directory, files="*/run.lock", calls=("open", "write"), named="run.lock", rewrites=RUN_DIRECTORY
    ),
    "plots": Kind(write=report, files="*/plots/*loss*", calls=WRITE, named="loss."),
    "report": Kind(write=report, files="*report.html*", named="report.html"),
    "export": Kind(write=hf_export, files="*model*.safetensors*", calls=(*ATOMIC, "truncate"), named=".safetensors"),
    "export, other files": Kind(
        write=hf_sidecars, files="*/folder/[0-9]/*", calls=("open", "write"), named="/folder/"
    ),
    "conversion, tensors": Kind(
        write=converted, files="*.distcp", calls=("open", "write", "fsync", "close"), named="__0_0.distcp"
    ),
    "conversion, .metadata": Kind(write=converted, files="*/.metadata", calls=("open", "write"), named=".metadata"),
    "conversion, common.pt": Kind(write=converted, files="*/common.pt", calls=("open", "write"), named="common.pt"),
    "conversion, metadata.json": Kind(write=converted, files="*/metadata.json", calls=WRITE, named="metadata.json"),
    "tracker": Kind(write=tracker, files="*/latest*", named="latest_checkpointed_iteration.txt"),
    "token cache": Kind(
        write=token_cache, files="*/cache/*", calls=("open", "write", "fsync"), named="--data-cache-path"
    ),
    "journal": Kind(write=journal, files="*/journal.jsonl", calls=("write", "fsync"), named="journal.jsonl"),
    "responses": Kind(write=responses, files="*.parquet*", named="00000.parquet"),
    "scores": Kind(write=stored_scores, files="*/folder/.*", calls=("open", "write", "truncate", "fsync"),
                   named="scores-00000.safetensors"),
    "scores, manifest": Kind(write=manifest, files="*manifest*", named="manifest.json"),
    "benchmark": Kind(write=benchmark_scores, files="*aime24*", named="aime24.jsonl"),
    "prepared prompts": Kind(
        write=prepared_prompts, files="*prompts1*", calls=("open", "write", "fsync", "mkdir", "rename"), named="--save"
    ),
    "prepared prompts, one file": Kind(
        write=partial(prepared_prompts, name="prompts.jsonl"), files="*/prompts1.*", calls=ATOMIC, named="--save"
    ),
    "prepared prompts, the last of several files": Kind(
        write=partial(prepared_prompts, name="prompts.jsonl"), files="*/folder/prompts1.jsonl", calls=("rename",),
        named="--save",
    ),
    "evaluation": Kind(write=evaluation, files="*/scores[0-9].json", calls=WRITE, named="scores1.json"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one failure."""

    failures: int
    error: str | None
    said: list[str]
    changed: list[str]
    """Former files that are gone or have other bytes."""
    left: list[str]
    """Files under temporary names."""
    again: str | None
    """The error of the same call when the disk works again."""


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _error_of(call: Callable[[], None]) -> str | None:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def attempt(name: str, directory: Path, call: str, number: int) -> Outcome:
    """Write the files of a kind, write them anew while ``call`` fails with errno ``number``, and once more."""
    kind, folder, said = KINDS[name], directory / "folder", []
    folder.mkdir(exist_ok=True)
    kind.write(folder, 0, [])
    before = _digests(folder)
    with failing(rule(kind.files, call, number)) as failures:
        error = _error_of(lambda: kind.write(folder, 1, said))
        failed = failures()
    after = _digests(folder)
    changed = sorted(n for n, digest in before.items() if after.get(n) != digest and n not in kind.rewrites)
    left = sorted(n for n in after if n.endswith((".tmp", f".{os.getpid()}")) or "/.tmp" in f"/{n}")
    again = _error_of(lambda: kind.write(folder, 1, []))
    return Outcome(failures=failed, error=error, said=said, changed=changed, left=left, again=again)
