"""Prompt files from anywhere: rows, whole files, Parquet columns and saved data sets.  See tests/hostile.py."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_tropd.data.encoding.encode import Encoder
from megatron_tropd.data.encoding.row_format import PromptFormat
from megatron_tropd.data.reading.readers import read_span
from megatron_tropd.data.reading.rows import BadRow, PromptError
from megatron_tropd.data.reading.sources import SourceError, find_source
from megatron_tropd.data.reading.spans import spans_of
from megatron_tropd.data.tokenizer import load_tokenizer
from tests.hostile import Mutator, Trial
from tests.test_data_tokenizer import save_tokenizer

ROW = {
    "prompt": "good",
    "response": "fine",
    "answer": "8",
    "domain": "d",
    "grader": "exact",
    "uid": 7,
    "extra": {"a": [1, 2]},
}
CHAT = {
    "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}],
    "response": "fine", "answer": 8, "uid": "seven", "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
}  # fmt: skip
TURNS = {
    "prompt": json.dumps([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]),
    "tools": json.dumps([{"name": "f"}]),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=True))


def encode(entry, tokenizer, chat=False):
    """Read and encode every row of an entry of --prompt-data; PromptError with all rows that cannot be used."""
    fmt = PromptFormat(max_prompt_length=400, max_response_length=40, chat_template=chat)
    encoder = Encoder(tokenizer=tokenizer, fmt=fmt, stop_ids=(0,))
    bad = []
    for file in find_source(str(entry)).files:
        for span in spans_of(file):
            items = list(read_span(span, fmt.columns))
            rows = [item for item in items if not isinstance(item, BadRow)]
            bad += [item for item in (*items, *encoder.encode(rows)) if isinstance(item, BadRow)]
    if bad:
        raise PromptError(bad)


COMPRESSIONS = {".jsonl.gz": "gzip", ".json.bz2": "bz2", ".jsonl.zst": "zstd"}
TYPED = (PromptError, SourceError)


@pytest.mark.parametrize("base", [ROW, CHAT, TURNS], ids=["row", "chat", "turns"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows(tmp_path, tokenizer, base, suffix):
    path, make = tmp_path / f"p{suffix}", Mutator(f"{base}{suffix}")
    with Trial(*TYPED) as trial:
        for _ in range(200):
            raw = make.json(base if suffix == ".jsonl" else [base])
            path.write_bytes(raw)
            trial.give(lambda: encode(path, tokenizer, chat=base is not ROW), raw, names=path.name)
    trial.check(200, accepted=0.01)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.bz2", ".parquet", ".jsonl.zst"])
def test_bytes(tmp_path, tokenizer, suffix):
    path, make = tmp_path / f"p{suffix}", Mutator(suffix)
    rows = [{**ROW, "uid": number} for number in range(6)]
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        text = json.dumps(rows) if ".json." in suffix else "".join(json.dumps(row) + "\n" for row in rows)
        with pa.output_stream(str(path), compression=COMPRESSIONS[suffix]) as file:
            file.write(text.encode())
    good = path.read_bytes()
    with Trial(*TYPED) as trial:
        for _ in range(150):
            raw = make.bytes(good)
            path.write_bytes(raw)
            trial.give(lambda: encode(path, tokenizer), raw, names=path.name)
    trial.check(150, accepted=0)


NOW = datetime.datetime(2024, 1, 2)
COLUMNS = [
    pa.array(["good"]), pa.array(["good"], pa.large_string()), pa.array(["good"]).dictionary_encode(), pa.array([None]), pa.array([7]),
    pa.array([2**64 - 1], pa.uint64()), pa.array([1.5]), pa.array([float("nan")]), pa.array([True]), pa.array([b"good"]),
    pa.array([b"\xff\xfe"]), pa.array([b"abcd"], pa.binary(4)), pa.array([NOW]), pa.array([2**63 - 1], pa.timestamp("s")),
    pa.array([-(2**63) + 1], pa.timestamp("ns")), pa.array([2**31 - 1], pa.date32()), pa.array([NOW.date()]), pa.array([2**40], pa.duration("s")),
    pa.array([2**62], pa.duration("s")), pa.array([86_399], pa.time32("s")), pa.array([decimal.Decimal("1.50")]), pa.array([0.5], pa.float16()),
    pa.array([[1, 2]]), pa.array([["a"]]), pa.array([[]], pa.list_(pa.string())), pa.array([{"a": 1}]), pa.array([{"role": "user", "content": "a"}]),
    pa.array([[{"role": "user", "content": "a"}]]), pa.array([[{"role": "user", "content": 7}]]), pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
    pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64())), pa.array([[[["a"]]]]), pa.array(["a\0b"]), pa.array([[NOW]]),
    pa.array([{"t": 2**63 - 1}], pa.struct([("t", pa.timestamp("us"))])), pa.array([2**63 - 1], pa.timestamp("us", tz="Mars/Olympus")),
    pa.array(["x" * 5000]), pa.array([{}], pa.struct([])),
]  # fmt: skip


def _broken_text():
    """A column of texts whose bytes are none, as another writer may leave them."""
    return pa.Array.from_buffers(
        pa.string(),
        1,
        [None, pa.py_buffer((0).to_bytes(4, "little") + (2).to_bytes(4, "little")), pa.py_buffer(b"\xff\xfe")],
    )


@pytest.mark.parametrize("chat", [False, True])
def test_columns(tmp_path, tokenizer, chat):
    """Columns of every type of Arrow in the place of each key."""
    path, draw = tmp_path / "p.parquet", Mutator(f"columns {chat}").draw
    columns = [*COLUMNS, _broken_text()]
    with Trial(*TYPED) as trial:
        for _ in range(200):
            keys = draw.sample(
                ["prompt", "response", "answer", "domain", "grader", "uid", "tools", "other"], draw.choice([1, 2, 3])
            )
            made = {"prompt": COLUMNS[0], **{key: draw.choice(columns) for key in keys}}
            try:
                pq.write_table(pa.table(made), path)
            except pa.ArrowException:  # Parquet does not have it
                made = {"prompt": COLUMNS[0]}
                pq.write_table(pa.table(made), path)
            trial.give(
                lambda: encode(path, tokenizer, chat),
                {key: str(value.type) for key, value in made.items()},
                names=path.name,
            )
    trial.check(200)


def test_saved_data_sets(tmp_path, tokenizer):
    """What ``datasets`` writes: its descriptions with mistakes, and names of files that lead elsewhere."""
    import datasets

    datasets.disable_progress_bars()
    both = datasets.DatasetDict(
        {name: datasets.Dataset.from_list([{"prompt": name, "response": "b"}]) for name in ("train", "test")}
    )
    both.save_to_disk(tmp_path / "both")
    files = ["dataset_dict.json", "train/state.json", "train/dataset_info.json", "train/data-00000-of-00001.arrow"]
    make = Mutator("saved", odd=["data-00000-of-00001.arrow", [{"filename": "../../p.arrow"}], ["train"]])
    with Trial(*TYPED, quotes="unreadable data set (") as trial:
        for number in range(120):
            path = tmp_path / "both" / files[number % len(files)]
            good = path.read_bytes()
            path.write_bytes(make.bytes(good) if path.suffix == ".arrow" else make.json(json.loads(good)))
            trial.give(lambda: encode(f"{tmp_path / 'both'}::train", tokenizer), path.read_bytes(), names="both")
            path.write_bytes(good)
    trial.check(120)


def test_names(tmp_path, monkeypatch):
    """What may stand after --prompt-data."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    make = Mutator("names")
    good = [
        "a.jsonl",
        str(tmp_path / "a.jsonl"),
        "owner/name",
        "owner/name@main::train",
        "owner/name::config/train",
        f"{tmp_path}::train",
    ]
    with Trial(SourceError) as trial:
        while trial.tried < 200:
            name = make.bytes(good[trial.tried % len(good)].encode()).decode("utf-8", errors="replace")
            if Path(name.partition("::")[0]) in tmp_path.parents:
                continue  # a folder of other tests, in which every file would be looked at
            trial.give(lambda name=name: find_source(name), name)
    trial.check(200, accepted=0.01)


@pytest.mark.parametrize("suffix", [".json.gz", ".jsonl.gz", ".jsonl"])
def test_files_that_grow(tmp_path, tokenizer, suffix):
    """A few kilobytes that become megabytes, which nothing holds as a whole, and many lines without a row."""
    path = tmp_path / f"p{suffix}"
    if suffix == ".json.gz":
        path.write_bytes(gzip.compress(b"[" + b" " * (64 << 20) + b"]", 1))
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(b" " * (20 << 20), 1))
    else:
        path.write_bytes(b"\n" * 200_000)
    with Trial(*TYPED) as trial:
        trial.give(lambda: encode(path, tokenizer), suffix, names=path.name)
    assert trial.tried == 1
