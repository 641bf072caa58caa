"""Small data sets in the published formats of the seven benchmarks, and scripts of answers with known scores."""

from __future__ import annotations

import base64
import csv
import json
import pickle
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tests.scripted_server import Reply


def write_all(data_dir: Path) -> Path:
    """Write all seven data sets below ``data_dir``."""
    _parquet(data_dir / "aime24/data/train-00000-of-00001.parquet", [
        {"id": 60 + i, "problem": f"Problem A24-{i}: find it.", "solution": "...", "answer": answer, "url": "u", "year": "2024"}
        for i, answer in enumerate(["204", "025", "7"])
    ])  # fmt: skip
    _jsonl(data_dir / "aime25/test.jsonl", [
        {"problem": f"Problem A25-{i} with \\boxed{{}} and {{question}}.", "answer": answer, "id": str(i)}
        for i, answer in enumerate(["70", "588"])
    ])  # fmt: skip
    _parquet(data_dir / "amc23/data/test-00000-of-00001.parquet", [
        {"id": i, "question": f"Problem AMC-{i}.", "answer": answer, "url": "u"} for i, answer in enumerate([27.0, 36.0])
    ])  # fmt: skip
    _write_gpqa(data_dir / "gpqa_diamond/gpqa_diamond.csv")
    _write_mmlu(data_dir / "mmlu_redux")
    _jsonl(data_dir / "ifbench/IFBench_test.jsonl", [
        _ifbench("1", "IF-1: say something.", ["count:numbers", "format:no_whitespace"], [{"N": 2}, {}]),
        _ifbench("2", "IF-2: say something.", ["count:conjunctions"], [{"small_n": 2}]),
    ])  # fmt: skip
    write_nltk_data(data_dir)
    _jsonl(data_dir / "livecodebench_v6/test6.jsonl", [
        lcb_row("LCB-1", "Print the sum of two numbers.", stdin=[("1 2\n", "3\n"), ("10 20\n", "30\n")]),
        lcb_row("LCB-2", "Return the largest.", calls=[("[1, 5, 2]", "5"), ("[7]", "7")], name="largest"),
        lcb_row("LCB-3", "Print the sum of two numbers.", stdin=[("1 2\n", "3\n"), ("2 2\n", "4\n")]),
        lcb_row("LCB-4", "Print the sum of two numbers.", stdin=[("1 2\n", "3\n")]),
    ])  # fmt: skip
    return data_dir


def _jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def _write_gpqa(path: Path) -> None:
    path.parent.mkdir(parents=True)
    names = ["Record ID", "Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)), "Subdomain"]
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.DictWriter(file, names)
        rows.writeheader()
        for i in range(2):
            wrong = {f"Incorrect Answer {n}": f"wrong {n} of {i}" for n in (1, 2, 3)}
            question = f"GPQA-{i}: which {{one}}, {{choices}}?\nSecond line."
            rows.writerow({"Record ID": f"rec{i}", "Question": question, "Correct Answer": f" right of {i}\n", **wrong})


def _write_mmlu(folder: Path) -> None:
    choices = ["first", "second", "third", "fourth"]
    rows = {
        "anatomy": [(0, 1, "ok", None), (1, 2, "wrong_groundtruth", "D")],
        "virology": [(2, 3, "ok", None)],
    }
    for subject, entries in rows.items():
        table = pyarrow.Table.from_pylist([
            {"question": f"MMLU-{i}?", "choices": choices, "answer": answer, "error_type": kind, "source": None,
             "correct_answer": corrected, "potential_reason": None}
            for i, answer, kind, corrected in entries
        ])  # fmt: skip
        path = folder / subject / "data-00000-of-00001.arrow"
        path.parent.mkdir(parents=True)
        with path.open("wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)


def _ifbench(key: str, prompt: str, ids: list[str], given: list[dict[str, Any]]) -> dict[str, Any]:
    """Published rows name every argument of every instruction, most of them null."""
    blank = {"N": None, "small_n": None, "keyword": None}
    return {"key": key, "prompt": prompt, "instruction_id_list": ids, "kwargs": [{**blank, **one} for one in given]}


def write_nltk_data(data_dir: Path) -> None:
    """Folders as NLTK unpacks them: a sentence tokenizer that has learned nothing, no stop words, no tagger."""
    for folder in ("tokenizers/punkt_tab/english", "corpora/stopwords", "taggers/averaged_perceptron_tagger_eng"):
        (data_dir / "nltk_data" / folder).mkdir(parents=True, exist_ok=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (data_dir / "nltk_data/tokenizers/punkt_tab/english" / name).write_text("")


def lcb_row(
    question: str, content: str, *, stdin: Sequence[tuple[str, str]] = (), calls: Sequence[tuple[str, str]] = (),
    name: str = "",
) -> dict[str, Any]:  # fmt: skip
    """One problem: its first test is public, the others are private and packed as LiveCodeBench packs them."""
    kind = "functional" if calls else "stdin"
    tests = [{"input": given, "output": wanted, "testtype": kind} for given, wanted in (calls or stdin)]
    private = base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests[1:])))).decode()
    return {
        "question_title": question, "question_content": f"{question}: {content}", "platform": "atcoder",
        "question_id": question, "contest_id": "c", "contest_date": "2025-02-01T00:00:00", "difficulty": "easy",
        "starter_code": f"class Solution:\n    def {name}(self, values: List[int]) -> int:\n        " if name else "",
        "public_test_cases": json.dumps(tests[:1]), "private_test_cases": private,
        "metadata": json.dumps({"func_name": name} if name else {}),
    }  # fmt: skip


def letter_of(option: str, form: str = "ANSWER: {}"):
    """A reply that chooses the option with this text, wherever the prompt shows it."""

    def reply(prompt: str) -> str:
        found = re.search(rf"^([A-D])\) {re.escape(option)}$", prompt, re.MULTILINE)
        assert found, prompt
        return form.format(found[1])

    return reply


RIGHT = Reply(text="So it is \\boxed{204}.")
BOXED_TWICE = Reply(text="First \\boxed{3}, no: \\boxed{204}.")
BOXED_TWICE_WRONG = Reply(text="First \\boxed{204}, no: \\boxed{3}.")
CUT_OFF = Reply(text="So it is \\boxed{204}. But wait", finish="length", tokens=32768)


def program(body: str) -> Reply:
    """A response with a program."""
    return Reply(text=f"Here it is:\n\n```python\n{body}\n```\n")


ADDS = "a, b = map(int, input().split())\nprint(a + b)"
LARGEST = "class Solution:\n    def largest(self, values: List[int]) -> int:\n        return max(values)"
SCRIPT: dict[str, list[Reply]] = {
    # AIME 2024, four samples: question means 1/2, 1/4, 1
    "A24-0": [RIGHT, BOXED_TWICE, BOXED_TWICE_WRONG, CUT_OFF],
    "A24-1": [
        Reply(text="\\boxed{25}"),
        Reply(text="\\boxed{25.5}"),
        Reply(text=""),
        Reply(text="\\boxed{\\frac{50}{2}}"),
    ],
    "A24-2": [Reply(text="\\boxed{7}")] * 4,
    # AIME 2025, two samples: 1/2 and 0
    "A25-0": [Reply(text="<think>\\boxed{1}</think>\\boxed{70}"), Reply(text="The final answer is $70$.")],
    "A25-1": [Reply(text="<think>It is \\boxed{588}.</think> I am not sure.", tokens=30), Reply(text="$\\boxed{589}$")],
    # AMC 2023, two samples: 1 and 1/2
    "AMC-0": [Reply(text="\\boxed{27}"), Reply(text="\\boxed{\\frac{54}{2}}")],
    "AMC-1": [Reply(text="thinking </think> \\boxed{36}"), Reply(text="\\boxed{36} </think> \\boxed{36", tokens=3)],
    # GPQA, two samples: 1/2 and 1
    "GPQA-0": [Reply(text=letter_of("right of 0")), Reply(text=letter_of("wrong 2 of 0"))],
    "GPQA-1": [Reply(text=letter_of("right of 1", "**Answer: ({})**")), Reply(text=letter_of("right of 1"))],
    # MMLU-Redux, one sample: 1 and 0; its middle row is not ok
    "MMLU-0?": [Reply(text="ANSWER: B")],
    "MMLU-2?": [Reply(text="ANSWER: A or B")],
    # IFBench, one sample: one of two instructions, and all
    "IF-1": [Reply(text="<think>hm</think>1 and 2")],
    "IF-2": [Reply(text="This and that, or nothing.")],
    # LiveCodeBench, one sample: right, right, fails the private test, no closed program
    "LCB-1": [program(ADDS)],
    "LCB-2": [program(LARGEST)],
    "LCB-3": [program("input()\nprint(3)")],
    "LCB-4": [Reply(text=f"```python\n{ADDS}")],
}
SAMPLES = {"aime24": 4, "aime25": 2, "amc23": 2, "gpqa_diamond": 2}
