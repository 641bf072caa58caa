"""The stages of tools/run_experiment.py, without running them: each command line is one that its command takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from megatron_tropd.benchmarks.flags import parser as benchmark_parser
from megatron_tropd.benchmarks.flags import split_server_flags
from megatron_tropd.cli import parse as parse_training
from megatron_tropd.generation.flags import parse_flags as parse_generation
from tools.experiment.stages import Interpreters, Stage, reports, stages
from tools.experiment.world import NUM_BENCHMARK, make_world
from tools.prompt_preparation.flags import parse as parse_preparation
from tools.run_experiment import run_stage

PYTHON = Path("/usr/bin/python3")


@pytest.fixture(scope="module")
def commands():
    return stages(Path("/out"), Interpreters(sglang=PYTHON, evalscope=PYTHON), steps=10)


def _after(words, name: str) -> list[str]:
    return list(words[words.index(name) + 1 :])


def _parse_benchmark(words):
    _, passed = benchmark_parser().parse_known_args(words)
    split_server_flags(passed)


def test_every_command_line_is_taken(commands):
    parsers = {
        "tools/prepare_prompts.py": lambda words: parse_preparation(words, ""),
        "megatron_tropd.train": parse_training,
        "megatron_tropd.generate": parse_generation,
        "megatron_tropd.benchmark": _parse_benchmark,
    }
    taken = []
    for stage in commands:
        name = next(name for name in parsers if name in stage.words)
        parsers[name](_after(stage.words, name))
        taken.append(name)
    assert set(taken) == set(parsers)


def test_every_stage_reads_what_an_earlier_one_writes(commands):
    written = [Path("/out/world")]
    for stage in commands:
        read = [Path(word) for word in stage.words if word.startswith("/out/")]
        own = stage.output if stage.output.suffix == ".jsonl" else stage.output.parent
        for path in read:
            mine = path in (stage.output, own)
            assert mine or any(path.is_relative_to(place) for place in written), (stage.title, path)
        written += [stage.output, own] if own != Path("/out") else [stage.output]
    for words in reports(Path("/out")):
        assert all(Path(word) in written for word in words if word.startswith("/out/"))


def test_the_world_has_duplicates_and_leaks_to_remove(tmp_path):
    make_world(world := tmp_path / "world")
    questions = [json.loads(line)["problem"] for line in (world / "benchmarks/aime24/aime24.jsonl").open()]
    rows = [json.loads(line)["prompt"][0]["content"] for line in (world / "published/rl.jsonl").open()]
    assert len(questions) == len(set(questions)) == NUM_BENCHMARK
    assert len(rows) - len(set(rows)) == 20 and len(set(rows) & set(questions)) == 5
    lessons = (world / "published/chat.jsonl").read_text()
    assert not any(question in lessons for question in questions)


def test_a_stage_is_done_when_its_command_ended_well(tmp_path):
    def stage(program: str) -> Stage:
        return Stage(name="x", title="a stage", words=(sys.executable, "-c", program), output=tmp_path / "made")

    done = tmp_path / "done" / "x.json"
    half = f"open({str(tmp_path / 'made')!r}, 'a').write('x'); raise SystemExit(3)"
    with pytest.raises(SystemExit, match="failed with exit code 3"):
        run_stage(stage(half), done)
    whole = half.replace("raise SystemExit(3)", "")
    run_stage(stage(whole), done)  # what it left is no sign that it was done
    run_stage(stage(whole), done)
    assert (tmp_path / "made").read_text() == "xx"
    with pytest.raises(SystemExit, match="done with other flags"):
        run_stage(stage(whole + " "), done)
