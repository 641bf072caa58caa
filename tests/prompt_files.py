"""Small published-looking data sets for the tests of tools/prepare_prompts.py, and what the tool makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tools.prepare_prompts import main


def write_rows(path: Path, rows: list) -> Path:
    """Write rows as the suffix says: Parquet, or JSONL (bytes are written as they are)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def prepare(data: Path | list[Path], save: Path, *flags: str) -> list[dict]:
    """Run the tool, which must succeed; returns the rows that it wrote."""
    given = data if isinstance(data, list) else [data]
    assert main(["--prompt-data", *map(str, given), "--save", str(save), *flags]) == 0
    return read_rows(save)


def read_rows(save: Path) -> list[dict]:
    """The rows of an output, without the columns that are null."""
    if save.suffix == ".jsonl":
        rows = [json.loads(line) for line in save.read_text(encoding="utf-8").splitlines()]
    else:
        paths = [save] if save.is_file() else sorted((save / "data").iterdir())
        rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def report_of(save: Path) -> dict:
    """The report of an output directory."""
    return json.loads((save / "report.json").read_text(encoding="utf-8"))


def user(text: str) -> list[dict]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


def rl_row(text: str, answer: str, index: object = None, ability: str = "MATH", source: str = "math_dapo") -> dict:
    """A row as DAPO-Math-17k has them."""
    return {
        "data_source": source,
        "prompt": user(text),
        "ability": ability,
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def questions_of(rows: list[dict]) -> list[str]:
    """The content of the last message of each row."""
    return [row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"] for row in rows]
