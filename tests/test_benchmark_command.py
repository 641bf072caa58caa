"""The benchmark command with real evalscope, asking a scripted server: exact scores and standard errors."""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from megatron_tropd.benchmark import main
from megatron_tropd.benchmarks.protocol import BENCHMARKS
from megatron_tropd.reporting.lock import RunLock
from tests.benchmark_data import SAMPLES, SCRIPT, letter_of, write_all
from tests.scripted_server import MODEL, Reply, serving
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".venv-benchmark" / "bin" / "python"
needs_evalscope = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"{PYTHON} does not exist; `make benchmark-env` makes it"
)
pytestmark = [pytest.mark.slow, needs_evalscope]

CUT_B = Reply(text="ANSWER: B", finish="length")
QUESTION_MEANS = {
    ("aime24", "accuracy"): [1 / 2, 1 / 4, 1],
    ("aime25", "accuracy"): [1 / 2, 0],
    ("aime25", "lenient"): [1, 0],
    ("amc23", "accuracy"): [1, 1 / 2],
    ("gpqa_diamond", "accuracy"): [1 / 2, 1],
    ("mmlu_redux", "accuracy"): [1, 0],
    ("ifbench", "prompt_strict"): [0, 1],
    ("ifbench", "instruction_strict"): [1 / 2, 1],
    ("livecodebench_v6", "accuracy"): [1, 1, 0, 0],
}


def arguments(server, data, output, benchmarks, samples, *more):
    return [
        "--server-urls", server.url, "--data-dir", str(data), "--output", str(output), "--evalscope-python", str(PYTHON),
        "--benchmarks", *benchmarks.split(), "--samples", *samples.split(), *more,
    ]  # fmt: skip


def benchmark(*arguments_):
    assert main(arguments(*arguments_)) == 0


def rows_of(output, name):
    return [json.loads(line) for line in (output / f"scores/{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(output directory, requests) of one run of all seven."""
    data, output = write_all(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("output") / "out"
    with serving(SCRIPT) as server:
        benchmark(server, data, output, " ".join(BENCHMARKS), " ".join(f"{n}={count}" for n, count in SAMPLES.items()))
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


def test_every_question_has_its_samples(run):
    first = rows_of(run[0], "aime24")[0]
    assert first["question"] == "train-00000-of-00001/60" and first["grading_errors"] == 0
    assert sorted(zip(first["scores"]["accuracy"], first["finish"], first["tokens"], strict=True)) == [
        (0.0, "length", 32768), (0.0, "stop", 10), (1.0, "stop", 10), (1.0, "stop", 10),
    ]  # fmt: skip
    (reviews,) = (run[0] / "evalscope/aime24/reviews/model").iterdir()
    graded = [json.loads(line)["sample_score"]["score"] for line in reviews.read_text().splitlines()]
    # The response that was cut off counts as wrong, so its box is not looked for.
    assert [score["extracted_prediction"] for score in graded if score["metadata"]["finish"] == "length"] == [""]
    assert [row["question"] for row in rows_of(run[0], "livecodebench_v6")] == ["LCB-1", "LCB-2", "LCB-3", "LCB-4"]


def test_every_request_says_how_to_sample(run):
    """A server's or a model's own defaults must not matter, and no seed may make all samples equal."""
    assert len(run[1]) == 12 + 4 + 4 + 4 + 2 + 2 + 4
    for body in run[1]:
        wanted = {"temperature": 1.0, "top_p": 0.7, "top_k": -1, "min_p": 0.0, "max_tokens": 32768, "repetition_penalty": 1.0,
                  "presence_penalty": 0.0, "frequency_penalty": 0.0, "model": MODEL}  # fmt: skip
        assert {key: body.get(key) for key in wanted} == wanted
        assert "seed" not in body and not body.get("n")


def test_prompts_hold_questions_as_they_are(run):
    prompts = {body["messages"][-1]["content"]: len(body["messages"]) for body in run[1]}
    assert prompts[
        "Problem A25-0 with \\boxed{} and {question}.\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    ] == 1  # fmt: skip
    (choice,) = (prompt for prompt in prompts if "GPQA-0" in prompt)
    assert "which {one}, {choices}?\nSecond line." in choice and "one of A,B,C,D." in choice
    assert prompts["IF-1: say something."] == 1
    (code,) = (prompt for prompt in prompts if "LCB-2" in prompt)
    assert "def largest" in code and prompts[code] == 2  # with LiveCodeBench's system message


def test_choices_by_their_switches(run, tmp_path):
    """The order of GPQA's options comes from a seed; rows with errors and cut off answers count if they shall."""
    script = {
        "GPQA-0": [Reply(text=letter_of("right of 0"))], "GPQA-1": [Reply(text="It must be E")],
        "MMLU-0?": [CUT_B], "MMLU-1?": [Reply(text="ANSWER: D")], "MMLU-2?": [Reply(text="I would say D")],
    }  # fmt: skip
    with serving(script) as server:
        benchmark(
            server, write_all(tmp_path / "data"), tmp_path / "out", "mmlu_redux gpqa_diamond", "gpqa_diamond=1",
            "--mmlu-redux-rows", "all", "--truncated", "graded", "--choice-seed", "5", "--sampling-profile", "qwen3",
        )  # fmt: skip
    scores = [row["scores"] for row in rows_of(tmp_path / "out", "mmlu_redux")]
    assert [score["accuracy"] for score in scores] == [[1.0], [1.0], [0.0]]
    assert [score["lenient"] for score in scores] == [[1.0], [1.0], [1.0]]
    assert [row["scores"]["accuracy"] for row in rows_of(tmp_path / "out", "gpqa_diamond")] == [[1.0], [0.0]]

    def order(requests):
        return {body["messages"][-1]["content"] for body in requests if "GPQA" in body["messages"][-1]["content"]}

    assert len(order(run[1])) == len(order(server.requests)) == 2 and not order(run[1]) & order(server.requests)
    assert {(body["top_k"], body["temperature"]) for body in server.requests} == {(20, 0.6)}


def test_a_killed_command_goes_on_without_asking_again(tmp_path):
    data, output = write_all(tmp_path / "data"), tmp_path / "out"
    script = {f"A24-{i}": [Reply(text=f"\\boxed{{{answer}}}")] * 4 for i, answer in enumerate((204, 25, 8))}
    predictions = output / "evalscope/aime24/predictions/model/tropd_aime24_default.jsonl"
    with serving(script, hold_after=7) as server:
        words = arguments(server, data, output, "aime24", "aime24=4")
        process = subprocess.Popen([sys.executable, "-m", "megatron_tropd.benchmark", *words], cwd=ROOT)
        assert server.held.wait(300)
        wait_for(lambda: predictions.read_text().count("\n") == 7, timeout=300)
        runners = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        assert runners and not psutil.wait_procs(runners, timeout=300)[1]  # it does not outlive the command
    for path in (predictions, output / "evalscope/aime24/reviews/model" / predictions.name):
        with path.open("a") as file:
            file.write('{"index": 11, "model_outp')  # as if the kill had come in the middle of a line
    with serving(script) as server:  # at another address
        benchmark(server, data, output, "aime24", "aime24=4")
        assert len(server.requests) == 5
    rows = rows_of(output, "aime24")
    assert [row["scores"]["accuracy"] for row in rows] == [[1.0] * 4, [1.0] * 4, [0.0] * 4]
    assert sorted(json.loads(line)["index"] for line in predictions.read_text().splitlines()) == list(range(12))
    (output / "summary.json").unlink()
    shutil.rmtree(output / "evalscope")
    with serving({}) as server:  # nothing is left to ask
        benchmark(server, data, output, "aime24", "aime24=4")
    assert json.loads((output / "summary.json").read_text())["aime24"]["num_responses"] == 12


def test_a_request_that_is_refused_is_no_answer(tmp_path, capsys):
    """evalscope would take the server's message for the model's answer."""
    data, output = write_all(tmp_path / "data"), tmp_path / "out"
    script = {"A25-0": [Reply(text="\\boxed{70}")], "A25-1": []}
    with serving(script) as server:
        output.mkdir()
        lock = RunLock(output / "benchmark.lock")  # as another command that runs there
        assert main(arguments(server, data, output, "aime25", "aime25=1")) == 2
        assert f"{output} is in use by process" in capsys.readouterr().err and not server.requests
        lock.release()
        assert main(arguments(server, data, output, "aime25", "aime25=1")) == 1
    error = capsys.readouterr().err
    assert "refused a request: HTTP 400" in error and "run the same command again" in error and "Traceback" not in error
    assert not (output / "scores/aime25.jsonl").exists()
    with serving({**script, "A25-1": [Reply(text="\\boxed{588}")]}) as server:
        benchmark(server, data, output, "aime25", "aime25=1")
        assert [body["messages"][-1]["content"][8:13] for body in server.requests] == ["A25-1"]


def test_a_full_disk_loses_nothing(tmp_path):
    """Files of this size are the largest that the command may write."""
    data, output = write_all(tmp_path / "data"), tmp_path / "out"
    script = {f"A24-{i}": [Reply(text=30_000 * "x" + "\\boxed{204}")] * 4 for i in range(3)}

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    with serving(script) as server:
        words = arguments(server, data, output, "aime24", "aime24=4", "--concurrency", "1")
        command = [sys.executable, "-m", "megatron_tropd.benchmark", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=small_files, check=False)
        assert done.returncode == 1 and "File too large" in done.stderr and "Traceback" not in done.stderr
        asked = len(server.requests)
    with serving(script) as server:
        benchmark(server, data, output, "aime24", "aime24=4")
        assert 0 < len(server.requests) < 12 and len(server.requests) + asked <= 13  # only what could not be written
    assert [row["scores"]["accuracy"] for row in rows_of(output, "aime24")] == [[1.0] * 4, [0.0] * 4, [0.0] * 4]


def test_a_server_that_never_answers_is_no_wait_for_ever(tmp_path, capsys):
    data, output = write_all(tmp_path / "data"), tmp_path / "out"
    with serving({"A25-0": [Reply(text="")] * 9}, hold_after=0) as server:
        words = arguments(server, data, output, "aime25", "aime25=1", "--limit", "1", "--response-timeout", "0.5")
        assert main(words) == 1
        assert len(server.requests) == 1
    assert f"no server is left; {server.url}/v1: APITimeoutError" in capsys.readouterr().err


def test_a_server_that_was_too_slow_once_is_not_asked_again(tmp_path):
    """It would always have the fewest requests in flight, and take its timeout from each of them."""
    data, output = write_all(tmp_path / "data"), tmp_path / "out"
    script = {f"{name}-{i}": [Reply(text="\\boxed{70}")] * 4 for name in ("A25", "AMC") for i in range(2)}
    with serving(script, hold_after=0) as slow, serving(script) as server:
        words = arguments(server, data, output, "aime25 amc23", "aime25=2 amc23=4")
        words[1:2] = [slow.url, server.url]
        assert main([*words, "--concurrency", "1", "--response-timeout", "4"]) == 0
        assert (len(slow.requests), len(server.requests)) == (1, 12)


def test_another_server_takes_over_from_a_dead_one(tmp_path, capsys):
    data, output = write_all(tmp_path / "data"), tmp_path / "out"
    script = {f"A24-{i}": [Reply(text="\\boxed{7}")] * 4 for i in range(3)}
    with serving(script, hold_after=0) as dying, serving(script) as server:
        words = arguments(server, data, output, "aime24", "aime24=4")
        words[1:2] = [dying.url, server.url]
        threading.Thread(target=lambda: (dying.held.wait(300), dying.stop()), daemon=True).start()
        assert main(words) == 0
        assert dying.requests and len(server.requests) == 12
    assert [row["scores"]["accuracy"][0] for row in rows_of(output, "aime24")] == [0.0, 0.0, 1.0]
    with serving({}) as gone:
        url = gone.url
    assert main(["--server-urls", url, *words[3:], "--limit", "1"]) == 1
    assert f"--server-urls {url}: /v1/models: " in capsys.readouterr().err
