"""The benchmark command's checks before anything starts.  Needs neither evalscope nor a server."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest

from megatron_tropd.benchmark import main
from megatron_tropd.benchmarks import flags
from megatron_tropd.benchmarks.code_tests import read_tests
from megatron_tropd.benchmarks.data_files import read_questions
from megatron_tropd.benchmarks.job import check_environment
from megatron_tropd.benchmarks.model_source import from_megatron
from megatron_tropd.benchmarks.protocol import BENCHMARKS, Protocol
from megatron_tropd.benchmarks.runner.grading import answer_text, grade_choice
from megatron_tropd.reporting.run_directory import HF_EXPORT
from tests.benchmark_data import lcb_row, write_all
from tests.hf_models import save_hf_checkpoint

IDS = {
    "aime24": ("train-00000-of-00001/60", "train-00000-of-00001/61", "train-00000-of-00001/62"),
    "aime25": ("test/0", "test/1"),
    "amc23": ("test-00000-of-00001/0", "test-00000-of-00001/1"),
    "gpqa_diamond": ("rec0", "rec1"),
    "mmlu_redux": ("anatomy/0", "virology/0"),
    "ifbench": ("1", "2"),
    "livecodebench_v6": ("LCB-1", "LCB-2", "LCB-3", "LCB-4"),
}


@pytest.fixture
def data(tmp_path):
    return write_all(tmp_path / "data")


def command(tmp_path, *words):
    """The command's exit code; its evalscope is this interpreter's, which has none."""
    return main([
        "--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--evalscope-python", sys.executable, *words,
    ])  # fmt: skip


@pytest.mark.parametrize("name", BENCHMARKS)
def test_published_formats_are_read(data, name):
    questions = read_questions(name, data, Protocol())
    assert questions.ids == IDS[name] and len(questions.rows) == len(IDS[name])
    assert read_questions(name, data, Protocol(limit=1)).ids == IDS[name][:1]


def test_rows_with_errors_come_with_the_switch_only(data):
    found = read_questions("mmlu_redux", data, Protocol(mmlu_redux_rows="all"))
    assert found.ids == ("anatomy/0", "anatomy/1", "virology/0")


def test_two_files_of_one_set_may_count_alike_but_no_set_is_there_twice(data):
    for part, problem in (("I", "one"), ("II", "two")):
        row = {"question": problem, "answer": "1", "id": 0}
        (data / f"aime25/aime2025-{part}.jsonl").write_text(json.dumps(row) + "\n")
    (data / "aime25/test.jsonl").unlink()
    assert read_questions("aime25", data, Protocol()).ids == ("aime2025-I/0", "aime2025-II/0")
    shutil.copy(data / "gpqa_diamond/gpqa_diamond.csv", data / "gpqa_diamond/copy.csv")
    with pytest.raises(ValueError, match=r"question rec0 is there twice"):
        read_questions("gpqa_diamond", data, Protocol())


def test_other_bytes_are_other_data(data):
    before = read_questions("aime25", data, Protocol()).sha256
    path = data / "aime25/test.jsonl"
    path.write_text(path.read_text().replace('"70"', '"71"'))
    assert read_questions("aime25", data, Protocol()).sha256 != before


def test_only_the_last_file_of_livecodebench_counts(data):
    older = lcb_row("OLD", "An older problem.", stdin=[("1\n", "1\n")])
    (data / "livecodebench_v6/test5.jsonl").write_text(json.dumps(older) + "\n")
    assert read_questions("livecodebench_v6", data, Protocol()).ids == IDS["livecodebench_v6"]


BAD_ROWS = {
    "aime25": ({"problem": "p", "solution": "s"}, r"row 1 has no column answer; expected the format of math-ai/aime25"),
    "aime24": ({"problem": " ", "answer": 3}, "question or answer is blank"),
    "amc23": ({"question": "q", "answer": None}, "answer a text or a number"),
    "mmlu_redux": ({"question": "q", "choices": ["a"], "answer": 0, "error_type": "ok", "correct_answer": None},
                   "expected a list of four"),
    "ifbench": ({"prompt": "p", "instruction_id_list": ["a"], "kwargs": []}, "lists of one length"),
    "livecodebench_v6": ({**lcb_row("q", "c", stdin=[("1", "1")]), "private_test_cases": "e30="},
                         "private_test_cases is neither JSON nor compressed tests"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_one_message_with_its_place(data, name):
    shutil.rmtree(data / name)
    (data / name).mkdir()
    row, message = BAD_ROWS[name]
    (data / name / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, row 1.*{message.removeprefix('row 1')}"):
        read_questions(name, data, Protocol())


def test_files_that_cannot_be_read_are_named(data):
    for name, file in (("aime25", "test.jsonl"), ("amc23", "data/test-00000-of-00001.parquet")):
        (data / name / file).write_bytes(b'{"problem": \xff')
        with pytest.raises(ValueError, match=rf"{file.replace('.', '.')} cannot be read"):
            read_questions(name, data, Protocol())


def test_all_that_is_missing_is_one_message(data, tmp_path, capsys):
    for name in ("aime24", "gpqa_diamond", "nltk_data/corpora"):
        shutil.rmtree(data / name)
    assert command(tmp_path, "--server-urls", "http://127.0.0.1:9") == 2
    error = capsys.readouterr().err
    for wanted in (
        f"{data}/aime24 has no file of HuggingFaceH4/aime_2024", "Idavidrein/gpqa (gpqa_diamond.csv)",
        "ifbench needs NLTK's stopwords", f"--evalscope-python {sys.executable} has no evalscope", "make benchmark-env",
    ):  # fmt: skip
        assert wanted in error
    assert "Traceback" not in error and not (tmp_path / "out").exists()


def test_an_environment_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere does not exist; make the environment with `make benchmark-env`"):
        check_environment(tmp_path / "nowhere")


def test_a_model_without_tokenizer_or_template_is_refused(data, tmp_path, capsys):
    model = save_hf_checkpoint(tmp_path / "model", "qwen3")
    words = ["--hf-checkpoint", str(model), "--benchmarks", "aime25"]
    assert command(tmp_path, *words) == 2
    assert "its tokenizer has no chat template" in capsys.readouterr().err
    (model / "tokenizer.json").unlink()
    assert command(tmp_path, *words) == 2
    assert f"tokenizer: {model} holds no vocabulary" in capsys.readouterr().err
    assert command(tmp_path, "--hf-checkpoint", str(tmp_path)) == 2
    assert f"--hf-checkpoint {tmp_path} is no HF model directory" in capsys.readouterr().err
    shutil.copytree(model, tmp_path / HF_EXPORT)
    (tmp_path / HF_EXPORT / "config.json").unlink()  # an export that was ended early
    assert command(tmp_path, "--run-dir", str(tmp_path)) == 2
    assert f"has no {HF_EXPORT}/config.json, the last file" in capsys.readouterr().err
    assert command(tmp_path, "--load", str(tmp_path / "none")) == 2
    assert "has no evalscope" in capsys.readouterr().err  # nothing is converted before the rest is right


def test_a_model_that_only_servers_know_is_no_error(data, tmp_path, capsys):
    model = save_hf_checkpoint(tmp_path / "model", "qwen3")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    for family, refused in (("gemma3_text", False), ("of no name", True)):
        (model / "config.json").write_text(json.dumps({"model_type": family}))
        capsys.readouterr()
        assert command(tmp_path, "--hf-checkpoint", str(model), "--benchmarks", "aime25") == 2
        error = capsys.readouterr().err
        assert "has no evalscope" in error and ("config.json" in error) == refused, error
        assert (f"{model}: config.json names no max_position_embeddings or no vocab_size" in error) == refused
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_a_user_keeps_is_not_overwritten(tmp_path):
    (tmp_path / "megatron/iter_0000003").mkdir(parents=True)
    (tmp_path / "megatron/iter_0000003/checkpoint.json").write_text("{}")
    (tmp_path / "megatron/latest_checkpointed_iteration.txt").write_text("3")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/model.safetensors").write_text("mine")
    with pytest.raises(
        ValueError, match=r"--save-hf .*kept is not empty and does not hold .*iter_0000003; give an empty"
    ):
        from_megatron(tmp_path / "megatron", None, tmp_path / "kept", print, keeps=True)
    with pytest.raises(ValueError, match="--iteration last: expected a number or 'release'"):
        from_megatron(tmp_path / "megatron", "last", tmp_path / "kept", print, keeps=True)
    with pytest.raises(ValueError, match="asked for iteration 4"):
        from_megatron(tmp_path / "megatron", "4", tmp_path / "kept", print, keeps=True)
    with pytest.raises(ValueError, match="could not be converted: "):
        from_megatron(tmp_path / "megatron", None, tmp_path / "new", print, keeps=True)


WRONG = {
    "no model": ([], "expected one of --hf-checkpoint, --load, --run-dir, --server-urls; found none"),
    "two models": (["--hf-checkpoint", "a", "--load", "b"], "found --hf-checkpoint, --load"),
    "idle": (["--server-urls", "http://a:1", "--save-hf", "x"], "--save-hf belongs to --load"),
    "unknown": (["--temprature=1"], "--temprature: there is no such flag; did you mean --temperature?"),
    "no flag at all": (["--zzz", "1"], "--zzz: there is no such flag; see --help"),
    "unknown of the servers": (
        ["--sglang-start-timout", "10"],
        "unknown flag --sglang-start-timout; did you mean --sglang-start-timeout?",
    ),
    "servers": (
        ["--server-urls", "http://a:1", "--sglang-mem-fraction-static", "0.5"],
        "is for servers that are started",
    ),
    "top-p": (["--top-p", "1.5"], "--top-p 1.5: expected a number above 0 and at most 1"),
    "limit": (["--limit", "0"], "--limit 0: expected a number above 0"),
    "samples": (["--samples", "aime24=0", "x"], "--samples aime24=0: expected NAME=N"),
    "template": (["--math-template", "solve"], "--math-template solve: expected a text with {question}"),
    "arguments": (["--chat-template-arguments", "[]"], "expected a JSON object"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_flags_are_one_message(tmp_path, capsys, case):
    words, message = WRONG[case]
    assert command(tmp_path, *words) == 2
    assert message in capsys.readouterr().err


def test_flags_make_the_protocol():
    words = [
        "--data-dir",
        "d",
        "--output",
        "o",
        "--sampling-profile",
        "qwen3",
        "--temperature",
        "0.7",
        "--samples",
        "aime24=8",
    ]
    args, rest = flags.parser().parse_known_args([*words, "--sglang-max-total-tokens", "99", "--sglang-log-requests"])
    assert flags.split_server_flags(rest) == ("--max-total-tokens", "99", "--log-requests")
    protocol = flags.protocol_of(args)
    assert (protocol.sampling.temperature, protocol.sampling.top_k, protocol.samples["aime24"]) == (0.7, 20, 8)
    assert protocol.samples["amc23"] == 32


# ---- what the runner does without evalscope ----


def test_private_tests_are_read_without_unpickling():
    row = lcb_row("q", "c", calls=[("[1]", "1"), ("[2]\n3", "5")], name="add")
    tests = read_tests(row)
    assert [(t.kind, t.input, t.output, t.function) for t in tests] == [
        ("functional", "[1]", "1", "add"), ("functional", "[2]\n3", "5", "add"),
    ]  # fmt: skip
    plain = read_tests({**row, "private_test_cases": json.dumps([{"input": "[4]", "output": "4"}])})
    assert plain[1].input == "[4]"


class Evil:
    """Unpickled, it would end this process."""

    def __reduce__(self):
        return sys.exit, (3,)


@pytest.mark.parametrize("content", [Evil(), ["[]"], 7, ("[]", "[]")], ids=["call", "list", "number", "two texts"])
def test_a_pickle_of_anything_else_is_refused(content):
    import base64
    import zlib

    packed = base64.b64encode(zlib.compress(pickle.dumps(content))).decode()
    with pytest.raises(ValueError, match="private_test_cases holds a pickle"):
        read_tests({**lcb_row("q", "c", stdin=[("1", "1")]), "private_test_cases": packed})


def test_what_follows_the_thinking_is_the_answer():
    assert answer_text("<think>A</think> B") == "B"
    assert answer_text("A</think> B") == "B"  # the template opened it
    assert answer_text("<think>A") == ""
    assert answer_text("B") == "B"


def test_letters_strict_and_lenient():
    assert grade_choice(["B"], "ANSWER: B").scores == {"accuracy": 1.0, "lenient": 1.0}
    assert grade_choice(["B"], "I would say B").scores == {"accuracy": 0.0, "lenient": 1.0}
    assert grade_choice(["A", "B"], "**Answer:** A").scores == {"accuracy": 1.0, "lenient": 1.0}
    assert grade_choice(["B"], "ANSWER: C, not B").scores == {"accuracy": 0.0, "lenient": 0.0}


def test_the_page_names_every_flag_of_a_run_that_changes_a_score_and_no_other():
    page = (Path(__file__).resolve().parent.parent / "docs/benchmarks.md").read_text(encoding="utf-8")
    ours = {word for action in flags.parser()._actions for word in action.option_strings}
    others = {
        "--seed",
        "--resamples",
        "--markdown",
        "--repo-type",
        "--local-dir",
        "--X",
        "--sglang-X",
    }  # of other commands
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", page))
    assert named <= ours | others
    (protocol,) = (group for group in flags.parser()._action_groups if group.title == "protocol")
    assert {action.option_strings[0] for action in protocol._group_actions} <= named
