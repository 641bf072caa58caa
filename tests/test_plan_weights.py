"""The planning command: any model, any pair of layouts, nothing started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_tropd.weights.coordinates.hf_shapes import hf_shapes
from tools.model_sizes import NAMES, find_architecture
from tools.plan_weights import TABLE, main, table_row

pytestmark = pytest.mark.slow


def test_text_says_what_was_planned_and_proved(capsys):
    flags = "--model qwen3-1.7b --world-size 4 --tensor-model-parallel-size 2 --num-engines 2 --sglang-tp-size 2"
    assert main([*flags.split(), "--show-messages", "1"]) == 0
    text = capsys.readouterr().out
    for part in (
        "TP2 DP2 -> 2 x TP2",
        "6.88 GB in all, 3.44 GB an engine",
        "sent / needed = 1.000",
        "bucket 0: rank 0",
    ):
        assert part in text


def test_json_of_an_hf_directory(capsys, tmp_path):
    from tests.test_parallel_layout import QWEN3_MOE

    (tmp_path / "config.json").write_text(json.dumps(QWEN3_MOE))
    flags = (
        "--world-size 4 --tensor-model-parallel-size 2 --expert-model-parallel-size 4 --expert-tensor-parallel-size 1"
    )
    flags += " --num-engines 2 --sglang-tp-size 4 --sglang-ep-size 2 --dtype fp32 --gpus-per-node 2 --json"
    assert main(["--model", str(tmp_path), *flags.split()]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["proof"]["redundancy"] == 1.0 and len(value["digest"]) == 64
    assert value["stats"]["bytes"] == value["proof"]["bytes_needed"] > 0


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("", ["--model is missing", "qwen3-32b"]),
        ("--model nothing", ["--model nothing is no directory with a config.json"]),
        (
            "--model qwen3-32b --tensor-model-parallel-size 5 --sglang-tp-size 7",
            ["--tensor-model-parallel-size 5 does not divide", "--sglang-tp-size 7 does not divide the model's 64 attention"],
        ),
        ("--model qwen3-8b --num-engines 2 --colocate", ["2 engines of 1 GPUs do not fit the trainer's 1"]),
        ("--model qwen3-8b --num-engines 0", ["--num-engines 0 must be at least 1"]),
    ],
)  # fmt: skip
def test_mistakes_are_named(capsys, flags, parts):
    assert main(flags.split()) == 2
    said = capsys.readouterr()
    assert not said.out and all(part in said.err for part in parts), said.err


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3-0.6b", 0.596), ("qwen3-1.7b", 1.72), ("qwen3-4b", 4.02), ("qwen3-8b", 8.19), ("qwen3-14b", 14.77),
     ("qwen3-32b", 32.76), ("qwen2.5-0.5b", 0.494), ("qwen2.5-1.5b", 1.544), ("qwen2.5-3b", 3.086), ("qwen2.5-7b", 7.62),
     ("qwen2.5-14b", 14.77), ("qwen2.5-32b", 32.76), ("qwen2.5-72b", 72.71), ("llama-3.1-8b", 8.03),
     ("qwen3-30b-a3b", 30.53), ("qwen3-235b-a22b", 235.09)],
)  # fmt: skip
def test_named_sizes_have_as_many_parameters_as_published(name, billions):
    assert name in NAMES
    count = 0
    for shape in hf_shapes(find_architecture(name)).values():
        elements = 1
        for extent in shape:
            elements *= extent
        count += elements
    assert count / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize("line", [line for line in TABLE if "a3b" not in line and "a22b" not in line])
def test_the_documented_table_is_what_the_command_says(line):
    """All but the seconds, and but the large sparse models, which take some."""
    cells = table_row(line)
    text = (Path(__file__).resolve().parent.parent / "docs" / "weights.md").read_text()
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("| qwen")
    ]
    assert len(rows) == len(TABLE)
    assert any(row[:3] + row[4:] == cells[:3] + cells[4:] for row in rows), cells
