"""Standard output that is closed, full, or has lost its reader: a command goes on, or ends with one message."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

from tests.tiny_run import flags, make_world
from tests.torchrun_jobs import ROOT, environment

pytestmark = pytest.mark.fault(number=30)
ENDS = {"closed": ">&-", "full": "> /dev/full", "no reader": "| true"}


def _shell(words: list[str], end: str, **options) -> subprocess.CompletedProcess:
    """Run a command whose standard output ends like that; ``set -o pipefail`` gives its exit code."""
    line = f"set -o pipefail; {shlex.join([sys.executable, '-W', 'ignore', *words])} {end}"
    if end.startswith("|"):  # the reader is gone before anything is printed
        line = f"exec 3> >(exec true); wait $!; {shlex.join([sys.executable, '-W', 'ignore', *words])} >&3"
    buffered = {name: value for name, value in environment().items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["bash", "-c", line], cwd=options.pop("cwd", ROOT), env=buffered, stderr=subprocess.PIPE, text=True,
        timeout=300, check=False, **options,
    )  # fmt: skip


RESULT = "import sys; from megatron_tropd.standard_streams import *\nopen_closed()\n"
CODE = (
    RESULT
    + "try:\n    print_result('x' * 10)\nexcept OutputError as e:\n    tell(f'error: {e}'); sys.exit(e.exit_code)"
)


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        (">&-", 0, ""),
        ("> /dev/full", 1, "error: standard output cannot be written: No space left on device\n"),
        ("| true", 1, "error: standard output cannot be written: its reader has gone away\n"),
    ],
)
def test_what_was_asked_for_cannot_be_printed(end, code, message):
    done = _shell(["-c", CODE], end)
    assert (done.returncode, done.stderr) == (code, message)


@pytest.mark.parametrize("end", ["2>&-", "2> /dev/full"])
def test_what_is_told_besides_does_not_end_the_work(end):
    done = _shell(["-c", RESULT + "tell('a'); tell('b'); print_result('done')"], f"{end} | grep -q done")
    assert done.returncode == 0


@pytest.mark.parametrize("end", ENDS.values())
def test_what_one_rank_prints_for_all_does_not_change_its_exit_code(end):
    code = "from megatron_tropd.parallel.print_once import *; print_once('help', Importance.CAUSE, sys.stdout)"
    done = _shell(["-c", RESULT + code], end)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_file_gets_the_number_of_a_closed_stream():
    code = RESULT + "import os\nassert os.open('/dev/zero', os.O_RDONLY) > 2; print('lost')"
    done = _shell(["-c", code], "<&- >&- 2>&-")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("end", ["> /dev/full", pytest.param("| true", marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    "words",
    [["-m", "megatron_tropd.benchmark", "table", "RESULTS"], ["-m", "checkpoint_convert", "inspect", "MODEL"]],
    ids=["benchmark", "inspect"],
)
def test_commands_whose_result_is_printed(tmp_path, words, end):
    from megatron_tropd.benchmarks.results import QuestionScores, Result, write_scores
    from tests.hf_models import save_hf_checkpoint

    if words[-1] == "MODEL":
        save_hf_checkpoint(tmp_path, "qwen3", seed=1)
    else:
        question = QuestionScores(
            benchmark="aime24", question="1", scores={"accuracy": [1.0]}, finish=["stop"], tokens=[3]
        )
        write_scores(tmp_path, Result(benchmark="aime24", questions=(question,)))
    done = _shell([*words[:-1], str(tmp_path)], end)
    assert done.returncode == 1 and done.stderr.count("standard output cannot be written") == 1, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "end", [">&-", pytest.param("> /dev/full 2> /dev/full", marks=pytest.mark.thorough),
            pytest.param("| true", marks=pytest.mark.thorough), pytest.param(">&- 2>&-", marks=pytest.mark.thorough)],
)  # fmt: skip
def test_a_run_goes_on_without_its_output(tmp_path, end):
    world = make_world(tmp_path / "world")
    argv = flags(world, tmp_path / "run", train_iters=1, rollout_batch_size=1, n_samples_per_prompt=1)
    done = _shell(["-m", "megatron_tropd.train", *argv], end, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert (tmp_path / "run" / "hf_export" / "config.json").is_file()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert os.listdir(tmp_path / "run" / "checkpoints")
