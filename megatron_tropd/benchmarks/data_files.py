"""Questions of the benchmarks in local files, in the formats in which they are published.

``DATA_DIR/<benchmark>/`` holds the files of one data set, in any folders: .jsonl, .csv, .parquet or .arrow.  They are
read in the order of their paths.  Nothing is downloaded.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tropd.benchmarks.code_tests import read_tests
from megatron_tropd.benchmarks.protocol import BENCHMARKS, Protocol
from megatron_tropd.json_files import shown

Row = dict[str, Any]

NLTK_FOLDER = "nltk_data"
NLTK_FILES = ("tokenizers/punkt_tab", "corpora/stopwords", "taggers/averaged_perceptron_tagger_eng")
"""What IFBench's checks read below ``DATA_DIR/nltk_data``: folders, as ``nltk.download`` unpacks them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Format:
    """Columns of a data set; of several names of one column the first that a row has is taken."""

    columns: Mapping[str, tuple[str, ...]]
    """Our name -> names in published files."""
    ids: tuple[str, ...]
    """Columns that name a question; the running number where a row has none of them."""


_MATH = _Format(columns={"question": ("problem", "question"), "answer": ("answer",)}, ids=("id", "ID"))
_GPQA_WRONG = tuple(f"Incorrect Answer {number}" for number in (1, 2, 3))
_FORMATS: dict[str, _Format] = {
    "aime24": _MATH,
    "aime25": _MATH,
    "amc23": _MATH,
    "gpqa_diamond": _Format(
        columns={name: (name,) for name in ("Question", "Correct Answer", *_GPQA_WRONG)}, ids=("Record ID",)
    ),
    "mmlu_redux": _Format(
        columns={name: (name,) for name in ("question", "choices", "answer", "error_type", "correct_answer")}, ids=()
    ),
    "ifbench": _Format(columns={name: (name,) for name in ("prompt", "instruction_id_list", "kwargs")}, ids=("key",)),
    "livecodebench_v6": _Format(
        columns={
            name: (name,)
            for name in ("question_content", "starter_code", "public_test_cases", "private_test_cases", "metadata")
        },
        ids=("question_id",),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """The questions of one benchmark, in order."""

    ids: tuple[str, ...]
    """One for each row, all different."""
    rows: tuple[Row, ...]
    """With our names of the columns beside the published ones."""
    sha256: str
    """Over names and bytes of the files."""


def read_questions(name: str, data_dir: Path, protocol: Protocol) -> Questions:
    """Return the questions of benchmark ``name`` below ``data_dir`` that ``protocol`` asks.

    Raises:
        FileNotFoundError: no file of the data set is there; the message names folder and data set.
        ValueError: a file cannot be read, or a row lacks a column or has a value that cannot be used.
    """
    folder = data_dir / name
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in _READERS and path.is_file()]
    if not files:
        raise FileNotFoundError(
            f"--data-dir {data_dir}: {folder} has no file of {BENCHMARKS[name].dataset}; expected its files "
            f"({', '.join(_READERS)}) there"
        )
    if name == "livecodebench_v6":
        files = _of_v6(files)
    digest, rows, ids = hashlib.sha256(), [], []
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder)}\0".encode() + hashlib.file_digest(file, "sha256").digest())
        for number, row in enumerate(_rows(path)):
            found = _checked(name, row, where=f"{path}, row {number + 1}")
            if name != "mmlu_redux" or protocol.mmlu_redux_rows == "all" or found["error_type"] == "ok":
                rows.append(found)
                ids.append(_id(name, row, path.relative_to(folder), number))
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(f"{folder}: question {twice} is there twice; the folder holds more than one copy of the set")
    chosen = slice(protocol.limit)
    return Questions(ids=tuple(ids[chosen]), rows=tuple(rows[chosen]), sha256=digest.hexdigest())


def check_nltk_data(data_dir: Path) -> None:
    """Check that what IFBench's checks read is there.

    Raises:
        FileNotFoundError: naming what is missing.
    """
    missing = [name for name in NLTK_FILES if not (data_dir / NLTK_FOLDER / name).is_dir()]
    if missing:
        packages = " ".join(Path(name).name for name in missing)
        raise FileNotFoundError(
            f"--data-dir {data_dir}: ifbench needs NLTK's {packages} in {data_dir / NLTK_FOLDER}; where there is a "
            f"network: python -m nltk.downloader -d {data_dir / NLTK_FOLDER} {packages}"
        )


def _of_v6(files: list[Path]) -> list[Path]:
    """LiveCodeBench's repository has six files of problems; version 6 added those of the last one."""
    named = [path for path in files if path.name == "test6.jsonl"]
    return named or files


def _rows(path: Path) -> Iterator[Row]:
    try:
        yield from _READERS[path.suffix](path)
    except (ValueError, csv.Error) as error:  # of JSON, UTF-8, CSV; pyarrow's own errors are ValueErrors
        raise ValueError(f"{path} cannot be read: {error}") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no JSON object")
                yield row


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    yield from pyarrow.parquet.read_table(path).to_pylist()


def _read_arrow(path: Path) -> Iterator[Row]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        yield from pyarrow.ipc.open_stream(source).read_all().to_pylist()


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet, ".arrow": _read_arrow,
}  # fmt: skip


def _id(name: str, row: Row, path: Path, number: int) -> str:
    for column in _FORMATS[name].ids:
        if row.get(column) not in (None, ""):
            # AIME 2025 is also published as two files, I and II, whose questions are both numbered from 0.
            return f"{row[column]}" if BENCHMARKS[name].kind != "math" else f"{path.stem}/{row[column]}"
    return f"{path.parent if path.parent.name else path.stem}/{number}"


def _checked(name: str, row: Row, *, where: str) -> Row:
    """Return ``row`` with our names of its columns, its values checked."""
    found: Row = dict(row)
    for ours, published in _FORMATS[name].columns.items():
        column = next((column for column in published if column in row), None)
        if column is None:
            raise ValueError(
                f"{where} has no column {' or '.join(published)}; expected the format of {BENCHMARKS[name].dataset}, "
                f"found columns {', '.join(map(str, row))}"
            )
        found[ours] = row[column]
    problem = _CHECKS[BENCHMARKS[name].kind](found)
    if problem:
        raise ValueError(f"{where}: {problem}")
    return found


def _math_problem(row: Row) -> str:
    answer, question = row["answer"], row["question"]
    if not isinstance(answer, str | int | float) or not isinstance(question, str):
        return "question must be a text, answer a text or a number"
    row["answer"] = str(answer).strip()
    return "" if row["answer"] and question.strip() else "question or answer is blank"


def _choice_problem(row: Row) -> str:
    if "choices" not in row:  # GPQA
        texts = [row[name] for name in ("Question", "Correct Answer", *_GPQA_WRONG)]
        return "" if all(isinstance(text, str) and text.strip() for text in texts) else "a question or option is blank"
    choices, answer = row["choices"], row["answer"]
    if (
        not isinstance(choices, list)
        or len(choices) != 4
        or not all(isinstance(c, str) for c in [*choices, row["question"]])
    ):
        return f"choices is {shown(choices)}; expected a list of four texts, and a question that is a text"
    return "" if str(answer) in {"0", "1", "2", "3"} else f"answer is {shown(answer)}; expected 0, 1, 2 or 3"


def _instruction_problem(row: Row) -> str:
    ids, arguments = row["instruction_id_list"], row["kwargs"]
    if (
        not isinstance(row["prompt"], str)
        or not isinstance(ids, list)
        or not ids
        or not isinstance(arguments, list)
        or len(ids) != len(arguments)
    ):
        return "prompt must be a text, instruction_id_list and kwargs lists of one length"
    return ""


def _code_problem(row: Row) -> str:
    texts = [name for name in _FORMATS["livecodebench_v6"].columns if not isinstance(row[name], str)]
    if texts:
        return f"{', '.join(texts)} must be texts"
    try:
        read_tests(row)
    except ValueError as error:
        return str(error)
    return ""


_CHECKS: dict[str, Callable[[Row], str]] = {
    "math": _math_problem, "choice": _choice_problem, "instructions": _instruction_problem, "code": _code_problem,
}  # fmt: skip
