"""How the benchmark command ends when its runner or its disk fails, with programs in the runner's place."""

from __future__ import annotations

import json

import pytest

from megatron_tropd.benchmark import main
from tests.benchmark_data import write_all
from tests.scripted_server import serving

LONG = 200_000
"""Characters of a job that no pipe holds, so that a runner that does not read it breaks the pipe."""
SCORES = {
    "kind": "scores",
    "benchmark": "aime25",
    "rows": [
        {"benchmark": "aime25", "question": f"q{i}", "scores": {"accuracy": [1.0], "lenient": [1.0]},
         "finish": ["stop"], "tokens": [3]}
        for i in range(2)
    ],
}  # fmt: skip


def run(tmp_path, runner, *more):
    """Exit code of the command with shell script ``runner`` in the place of evalscope's interpreter."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$2" = -c ] && echo 1.14.1 && exit\n{runner}\n')
    python.chmod(0o755)
    with serving({}) as server:
        return main([
            "--server-urls", server.url, "--data-dir", str(write_all(tmp_path / "data")), "--output",
            str(tmp_path / "out"), "--evalscope-python", str(python), "--benchmarks", "aime25", *more,
        ])  # fmt: skip


ENDS = {
    "at its start": ("echo no module >&2; exit 3", "ended with status 3; end of {log}:\nno module\n"),
    "in a line": ('read job; printf \'{"kind": "progr\'; exit 9', "ended with status 9; end of {log}:\n(empty log)"),
    "with a word": ("read job; echo hello", "the runner wrote 'hello\\n' instead of a message"),
}


@pytest.mark.parametrize("runner, expected", ENDS.values(), ids=ENDS)
def test_a_runner_that_ends_early_is_a_failure(tmp_path, capsys, runner, expected):
    assert run(tmp_path, runner, "--math-template", "{question}" + LONG * "x") == 1
    error = capsys.readouterr().err
    assert expected.format(log=tmp_path / "out" / "runner.log") in error
    assert "run the same command again" in error and "Traceback" not in error


def test_scores_that_cannot_be_written_are_a_failure(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scores").write_text("a file where the folder should be")
    assert run(tmp_path, f"read job; echo '{json.dumps(SCORES)}'; echo '{{\"kind\": \"done\"}}'") == 1
    assert "run the same command again" in capsys.readouterr().err
