"""The runner's process: started in evalscope's environment with a job, ended with this process, its messages read."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tropd.benchmarks.protocol import Protocol
from megatron_tropd.benchmarks.results import QuestionScores, Result
from megatron_tropd.benchmarks.serving import Served

LAUNCHER = Path(__file__).with_name("runner") / "launch.py"
_TAIL_BYTES = 3000
_LINE_CHARACTERS = 200
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


class RunnerFailed(RuntimeError):
    """The work ended before it was done; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the runner is to do."""

    benchmarks: tuple[str, ...]
    data_dir: Path
    output: Path
    protocol: Protocol
    concurrency: int
    """Requests in flight, at all servers together."""
    code_at_once: int
    """Generated programs that run at one time."""
    response_timeout_s: float
    """Of one response; a server that needs longer counts as dead."""

    def to_json(self, served: Served) -> dict[str, Any]:
        """Return what the runner reads.  It holds the servers' key, so it is written to a pipe only."""
        return {
            "benchmarks": list(self.benchmarks), "data_dir": str(self.data_dir.absolute()),
            "output": str(self.output.absolute()), "protocol": self.protocol.to_json(), "concurrency": self.concurrency,
            "code_at_once": self.code_at_once, "urls": list(served.urls), "model": served.model, "key": served.key,
            "response_timeout_s": self.response_timeout_s,
        }  # fmt: skip


def check_environment(python: Path) -> str:
    """Return the version of evalscope in the environment of ``python``.

    Raises:
        ValueError: it has none, or does not exist.
    """
    advice = "make the environment with `make benchmark-env`, or give its interpreter with --evalscope-python"
    if not python.exists():
        raise ValueError(f"--evalscope-python {python} does not exist; {advice}")
    done = subprocess.run(
        [str(python), "-P", "-c", "from importlib.metadata import version; print(version('evalscope'))"],
        capture_output=True, text=True, check=False, env=_environment(),
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"--evalscope-python {python} has no evalscope; {advice}")
    return done.stdout.strip()


def run_job(python: Path, job: Job, served: Served, progress: Callable[[str, int, int], None]) -> Iterator[Result]:
    """Yield every benchmark as it is complete.

    Args:
        python: interpreter of evalscope's environment.
        job: what to run.
        served: where to ask.
        progress: called with benchmark, graded responses and all responses.

    Raises:
        RunnerFailed: the runner ended early, or wrote what is no message; what was answered is kept in ``job.output``.
    """
    job.output.mkdir(parents=True, exist_ok=True)
    log = job.output / "runner.log"
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [str(python), "-P", str(LAUNCHER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            env=_environment(), start_new_session=True, text=True,
        )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # it ended already; its log says why
            process.stdin.write(json.dumps(job.to_json(served)) + "\n")
            process.stdin.flush()
        for message in _messages(process.stdout):
            if message["kind"] == "progress":
                progress(message["benchmark"], message["done"], message["total"])
            elif message["kind"] == "scores":
                questions = tuple(QuestionScores(**row) for row in message["rows"])
                yield Result(benchmark=message["benchmark"], questions=questions)
            elif message["kind"] == "error":
                raise RunnerFailed(f"{message['text']} (all of it: {log})")
            else:
                return
        raise RunnerFailed(f"the runner ended with status {process.wait()}; end of {log}:\n{_tail(log)}")
    finally:
        _end(process)
        with contextlib.suppress(BrokenPipeError):  # what could not be written is written once more
            process.stdin.close()
        process.stdout.close()


def _messages(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the runner's messages; a last line without an end is one that it was killed in.

    Raises:
        RunnerFailed: a line is no message.
    """
    for line in lines:
        if not line.endswith("\n"):
            return
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict) or "kind" not in message:
            raise RunnerFailed(f"the runner wrote {line[:_LINE_CHARACTERS]!r} instead of a message")
        yield message


def _environment() -> Mapping[str, str]:
    """This process's environment without what would reach into the other one's packages, or send prompts elsewhere."""
    kept = {
        name: value for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "TROPD_")) and name.lower() not in _PROXIES
    }  # fmt: skip
    return {**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _end(process: subprocess.Popen[str]) -> None:
    """Kill the runner's group, if it is still there: nothing of it is worth keeping that is not on disk."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tail(log: Path) -> str:
    return log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip() or "(empty log)"
