"""The benchmark command with real evalscope, asking a scripted server: exact scores and standard errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_tropd.benchmark import main
from megatron_tropd.benchmarks.protocol import BENCHMARKS
from tests.benchmark_data import SAMPLES, SCRIPT, write_all
from tests.scripted_server import serving

PYTHON = Path(__file__).resolve().parent.parent / ".venv-benchmark" / "bin" / "python"
needs_evalscope = pytest.mark.skipif(not PYTHON.exists(), reason=f"{PYTHON} does not exist; `make benchmark-env` makes it")
pytestmark = [pytest.mark.slow, needs_evalscope]

COUNTS = [f"{name}={count}" for name, count in SAMPLES.items()]
QUESTION_MEANS = {
    ("aime24", "accuracy"): [1 / 2, 1 / 4, 1],
    ("aime25", "accuracy"): [1 / 2, 0],
    ("amc23", "accuracy"): [1, 1 / 2],
    ("gpqa_diamond", "accuracy"): [1 / 2, 1],
    ("mmlu_redux", "accuracy"): [1, 0],
    ("ifbench", "prompt_strict"): [0, 1],
    ("ifbench", "instruction_strict"): [1 / 2, 1],
    ("livecodebench_v6", "accuracy"): [1, 1, 0, 0],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(output directory, requests) of one run of all seven."""
    data, output = write_all(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("output") / "out"
    with serving(SCRIPT) as server:
        assert main([
            "--server-urls", server.url, "--data-dir", str(data), "--output", str(output), "--evalscope-python", str(PYTHON),
            "--samples", *COUNTS,
        ]) == 0  # fmt: skip
        return output, list(server.requests)


@pytest.mark.parametrize("benchmark, metric", QUESTION_MEANS, ids=str)
def test_scores_and_standard_errors_are_exact(run, benchmark, metric):
    means = QUESTION_MEANS[benchmark, metric]
    found = json.loads((run[0] / "summary.json").read_text())[benchmark]["metrics"][metric]
    mean = sum(means) / len(means)
    error = math.sqrt(sum((value - mean) ** 2 for value in means) / (len(means) - 1) / len(means))
    assert found["num_questions"] == len(means)
    assert found["mean"] == pytest.approx(mean, abs=1e-12)
    assert found["standard_error"] == pytest.approx(error, abs=1e-12)
