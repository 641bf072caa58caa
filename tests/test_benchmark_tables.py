"""Results on disk, tables, the paper's numbers, and the commands that only read."""

from __future__ import annotations

import math

import pytest

from megatron_tropd.atomic_files import replacing, write_text
from megatron_tropd.benchmark import main
from megatron_tropd.benchmarks.paper_results import PAPER
from megatron_tropd.benchmarks.protocol import BENCHMARKS, PROFILES, Protocol, Sampling
from megatron_tropd.benchmarks.results import (
    QuestionScores,
    Result,
    keep_config,
    read_results,
    read_scores,
    write_scores,
    write_summary,
)
from megatron_tropd.benchmarks.serving import passed_flags
from megatron_tropd.benchmarks.tables import results_table

LONG = 5000 * "x"
"""A word that no file can be called."""
RESPONSES = {"aime24": 960, "aime25": 960, "amc23": 1280, "gpqa_diamond": 792, "ifbench": 294, "livecodebench_v6": 175}


def result(name, means, samples=2):
    """A result whose questions have these means on every metric."""
    questions = []
    for number, mean in enumerate(means):
        scores = [1.0] * round(mean * samples) + [0.0] * (samples - round(mean * samples))
        questions.append(QuestionScores(
            benchmark=name, question=f"q{number}", scores=dict.fromkeys(BENCHMARKS[name].metrics, scores),
            finish=["stop"] * (samples - 1) + ["length"], tokens=[10] * samples,
        ))  # fmt: skip
    return Result(benchmark=name, questions=tuple(questions))


def written(path, results, name="model a", **changes):
    settings = Protocol(**changes)
    keep_config(
        path,
        name=name,
        model={"weights": name},
        benchmarks={r.benchmark: settings.settings_of(r.benchmark) for r in results},
    )
    for one in results:
        write_scores(path, one)
    write_summary(path, results)
    return path


def cut(value):
    return math.floor(value * 100 + 1e-7) / 100


def test_the_papers_numbers_are_possible_counts():
    """AIME and AMC are cut to two decimals, the others rounded; a wrong digit is very likely no such share."""
    impossible = []
    for setting in PAPER.values():
        for row in setting.rows:
            for name, value in row.scores.items():
                total = RESPONSES.get(name)
                show = cut if name in ("aime24", "aime25", "amc23") else lambda share: round(share + 1e-9, 2)
                if total and not any(show(100 * count / total) == value for count in range(total + 1)):
                    impossible.append((setting.student, row.method, name))
    assert impossible == [("Qwen3-SFT-1.7B", "teacher", "gpqa_diamond")]


def test_the_papers_means_and_differences():
    """What its text says of its tables (in percent)."""
    rows = {key: {row.method: row.scores for row in setting.rows} for key, setting in PAPER.items()}

    def mean(scores):
        return sum(scores.values()) / len(scores)

    assert [round(mean(rows["math"][m]), 2) for m in ("OPD", "EOPD", "TrOPD", "TrOPD+AOPD")] == [
        37.11,
        38.0,
        40.63,
        41.67,
    ]
    assert round(mean(rows["three-domains"]["TrOPD"]), 2) == 37.61
    assert [cut(mean(rows["qwen3"][m])) for m in ("student", "teacher", "OPD", "TrOPD")] == [39.87, 73.43, 48.28, 51.72]
    ours, theirs = rows["qwen3"]["TrOPD"], rows["qwen3"]["OPD"]
    gains = [round(ours[n] - theirs[n], 2) for n in ("aime25", "livecodebench_v6", "ifbench", "gpqa_diamond")]
    assert gains == [3.34, 4.0, 5.11, 6.18]


def test_scores_come_back_as_they_were_written(tmp_path):
    results = [result("aime24", [1, 0.5]), result("ifbench", [0, 1], samples=1)]
    assert list(read_results(written(tmp_path, results)).values()) == results
    (tmp_path / "scores/aime24.jsonl").write_text('{"benchmark": "aime24"}\n')
    with pytest.raises(ValueError, match=r"aime24\.jsonl is not a file of scores"):
        read_results(tmp_path)
    with pytest.raises(ValueError, match="no complete benchmark"):
        read_results(tmp_path / "elsewhere")


def test_a_file_of_scores_without_questions_is_no_complete_benchmark(tmp_path):
    written(tmp_path, [result("aime24", [1]), result("amc23", [1])])
    (tmp_path / "scores" / "aime24.jsonl").write_text("")
    assert read_scores(tmp_path, "aime24") is None
    assert list(read_results(tmp_path)) == ["amc23"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    """Lone surrogates of a model's text cannot be encoded, and are no error."""
    path = tmp_path / "file"
    write_text(path, "a\ud800b\n")
    with pytest.raises(OSError), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise OSError("full")
    assert path.read_text(encoding="utf-8") == "a?b\n" and list(tmp_path.iterdir()) == [path]


def test_samples_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="q: lists of samples differ"):
        QuestionScores(benchmark="aime24", question="q", scores={"accuracy": [1.0]}, finish=["stop"] * 2, tokens=[1, 1])


def test_one_directory_is_of_one_model_and_one_protocol(tmp_path):
    written(tmp_path, [result("aime24", [1])])
    written(tmp_path, [result("amc23", [1])])  # another benchmark of the same
    with pytest.raises(ValueError, match=r"another model.*directory\.  the files of --hf-checkpoint[^;]*$"):
        keep_config(tmp_path, name="x", model={"weights": "other"}, benchmarks={})
    with pytest.raises(ValueError, match=r"another benchmark aime24.*--truncated: 'wrong' there, 'graded' here$"):
        written(tmp_path, [result("aime24", [1])], truncated="graded")
    with pytest.raises(ValueError, match=r"\.  --top-k: -1 there, 20 here$"):
        written(tmp_path, [result("aime24", [1])], sampling=Sampling(temperature=1.0, top_p=0.7, top_k=20))


def test_a_run_does_not_go_on_with_other_flags_for_the_servers(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("a")
    words = ["--chat-template", str(template), "--mem-fraction-static", "0.8"]

    def keep(*given):
        model = {"weights": "w", **passed_flags(given)}
        keep_config(tmp_path / "out", name="x", model=model, benchmarks={})

    assert passed_flags(["--json-model-override-args", LONG]) == {"--sglang-json-model-override-args": [LONG]}
    keep(*words, "--quantization=fp8")
    keep("--quantization", "fp8", *words[:3], "0.7")  # in another order, with another share of memory
    with pytest.raises(ValueError, match=r"\.  --sglang-quantization: fp8 there, not given here$"):
        keep(*words)
    with pytest.raises(ValueError, match=r"\.  --sglang-speculative-num-steps: not given there, 3 here$"):
        keep(*words, "--quantization", "fp8", "--speculative-num-steps", "3")
    template.write_text("b")
    with pytest.raises(ValueError, match=r"\.  --sglang-chat-template: sha256:\w+ there, sha256:\w+ here$"):
        keep(*words, "--quantization", "fp8")


def test_a_protocol_survives_json_and_names_what_matters():
    protocol = Protocol(sampling=PROFILES["qwen3"], limit=3, chat_template_arguments={"enable_thinking": False})
    assert Protocol.from_json(protocol.to_json()) == protocol
    assert protocol.sampling == Sampling(temperature=0.6, top_p=0.95, top_k=20, max_tokens=32768)
    assert "choice_seed" in protocol.settings_of("gpqa_diamond")
    assert "choice_seed" not in protocol.settings_of("aime24")
    assert protocol.settings_of("mmlu_redux")["mmlu_redux_rows"] == "ok"
    assert {name: Protocol().samples[name] for name in ("aime24", "amc23", "gpqa_diamond", "ifbench")} == {
        "aime24": 32, "amc23": 32, "gpqa_diamond": 4, "ifbench": 1,
    }  # fmt: skip


def test_a_table_has_our_rows_and_the_papers():
    runs = {
        "mine": {"aime24": result("aime24", [1, 0.5]), "amc23": result("amc23", [1])},
        "half": {"aime24": result("aime24", [0])},
    }
    table = results_table(runs, ["three-domains"])
    assert table.rows[0] == ("model", "AIME 2024", "AMC 2023", "mean")
    assert table.rows[1] == ("mine", "75.00 +- 25.00", "100.00", "87.50")
    assert table.rows[2] == ("half", "0.00", "", "")
    assert table.rows[5] == ("paper, DeepSeek-R1-Distill-Qwen-1.5B, TrOPD", "36.04", "70.93", "53.48")
    lines = table.markdown().splitlines()
    assert lines[:2] == ["| model | AIME 2024 | AMC 2023 | mean |", "| --- | ---: | ---: | ---: |"]
    assert len({len(line) for line in table.text().splitlines() if line.endswith("8")}) == 1


def test_compare_and_table_commands(tmp_path, capsys):
    a = written(tmp_path / "a", [result("aime24", [1, 0.5, 1]), result("amc23", [1, 0])])
    b = written(tmp_path / "b", [result("aime24", [0.5, 0, 0.5]), result("amc23", [1, 0])], name="model b")
    assert main(["compare", str(a), str(b), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| benchmark | model a - model b | 95% interval | p |"
    assert lines[2] == "| AIME 2024 | +50.00 | [+50.00, +50.00] | 0.0002 |"
    assert lines[3] == "| AMC 2023 | +0.00 | [+0.00, +0.00] | 1.0000 |"
    assert lines[4].startswith("| mean | +25.00 | [+25.00, +25.00]")
    assert main(["table", str(a), str(b), "--paper-setting", "qwen3"]) == 0
    assert "paper, Qwen3-SFT-1.7B, TrOPD" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    a = written(tmp_path / "a", [result("aime24", [1, 0.5])])
    for other, why in (
        (written(tmp_path / "b", [result("aime24", [1])]), "have other questions"),
        (written(tmp_path / "c", [result("aime24", [1, 0])], truncated="graded"), "not measured in the same way: truncated"),
        (written(tmp_path / "d", [result("amc23", [1, 0])]), "nothing to compare"),
    ):  # fmt: skip
        assert main(["compare", str(a), str(other)]) == 2
        assert why in capsys.readouterr().err
    few = written(tmp_path / "e", [result("aime24", [1, 0], samples=4)], samples={**Protocol().samples, "aime24": 4})
    assert main(["compare", str(a), str(few)]) == 0  # another number of samples is another precision, not another score
