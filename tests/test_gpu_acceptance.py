"""The acceptance command: its table, its verdicts, its deadlines, and every section on a CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import warnings
from unittest.mock import patch

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_tropd.models.hf_config import load_architecture
from tests.torchrun_jobs import ROOT, environment
from tools.acceptance import flops, host_waits, shapes, trace
from tools.acceptance.report import Report, reason_of
from tools.acceptance.runner import run_sections
from tools.acceptance.sections import SECTIONS, Section
from tools.acceptance.setting import Setting
from tools.acceptance.table import JSON_FILE, MARKDOWN_FILE, Results, Row, SectionEnd, markdown, read_row, write
from tools.acceptance.vocab_shards import on_shards
from tools.acceptance.weights import digest

VERDICTS = ("pass", "miss", "failed", "not run", "measured")


# ---- table and verdicts ----


def _results(*rows):
    end = SectionEnd(letter="a", title="head", seconds=1.4, how="ended")
    return Results(command="python tool", hardware={"GPU": "none"}, sections=(end,), rows=rows)


def test_the_table_has_every_row_in_one_line_of_its_own(tmp_path):
    row = Row(
        section="a", what="a | b", verdict="failed", expected="at most 1", measured="2", reason="first\nsecond | x"
    )
    write(tmp_path, _results(row, Row(section="b", what="c", verdict="not run", details=("d",))))
    text = (tmp_path / MARKDOWN_FILE).read_text()
    assert "| a | a / b | at most 1 | 2 | failed | first second / x |\n" in text
    assert "1 failed, 1 not run" in text and "- GPU: none" in text and "| a. head | 1 | ended |" in text
    found = json.loads((tmp_path / JSON_FILE).read_text())
    assert read_row(found["rows"][0]) == row and found["rows"][1]["details"] == ["d"]
    assert sorted(file.name for file in tmp_path.iterdir()) == [JSON_FILE, MARKDOWN_FILE], "no temporary file is left"


def test_only_a_failed_row_is_a_failure():
    rows = {verdict: Row(section="a", what="x", verdict=verdict) for verdict in VERDICTS}
    assert {verdict: _results(row).good for verdict, row in rows.items()} == {
        "pass": True, "miss": True, "failed": False, "not run": True, "measured": True,
    }  # fmt: skip
    assert markdown(_results())


@pytest.fixture
def report(tmp_path):
    return Report("a", tmp_path / "rows")


def _rows(report):
    return [read_row(json.loads(line)) for line in report._file.read_text().splitlines()]


def test_verdicts(report):
    report.limit("limit", 1.0, 1.0)
    report.limit("above", 1.1, 1.0)
    report.limit("nan", math.nan, 1.0)
    report.goal("goal", 1.2, at_most=1.2)
    report.goal("missed", 0.39, at_least=0.4, form=".0%")
    report.goal("nan", math.nan, at_least=0.4)
    report.goal("other hardware", 0.1, at_least=0.4, applies=False)
    report.same("equal", True)
    report.same("different", False)
    report.measured("number", 3.0, unit=" s")
    report.not_run("absent", "why")
    rows = _rows(report)
    assert [row.verdict for row in rows] == [
        "pass", "failed", "failed", "pass", "miss", "miss", "measured", "pass", "failed", "measured", "not run",
    ]  # fmt: skip
    assert (rows[4].expected, rows[4].measured, rows[4].value) == ("goal: at least 40%", "39%", 0.39)
    assert rows[2].value is None and rows[2].measured == "nan"
    assert rows[6].expected == "" and rows[-1].reason == "why"


def test_an_exception_is_a_row_and_the_section_goes_on(report, capsys):
    with report.attempt("a part"):
        raise ValueError("one | two")
    with report.attempt("another"):
        report.same("equal", True)
    failed, equal = _rows(report)
    assert (failed.what, failed.verdict, equal.verdict) == ("a part", "failed", "pass")
    assert failed.reason.endswith("ValueError: one | two") and "Traceback" in capsys.readouterr().err


def test_reasons_are_short():
    error = ValueError("x" * 5000)
    assert len(reason_of(error)) < 800 and reason_of(error).startswith("... ")


# ---- processes and deadlines ----

HANGS = """
import subprocess, sys, time
def run(report, setting):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    report.measured("child", child.pid)
    print("now it hangs", flush=True)
    time.sleep(600)
"""
WORKS = """
def run(report, setting):
    report.same("tiny", setting.tiny and setting.device == "cpu")
"""
RAISES = """
def run(report, setting):
    report.same("before", True)
    raise RuntimeError("out of luck")
"""
DIES = """
import os
def run(report, setting):
    print("last words", flush=True)
    os._exit(9)
"""
SILENT = "def run(report, setting): pass"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs sections that are given as source code; returns rows by section, and the results."""

    def call(sources, *, deadline=60.0, time_limit=120.0):
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        sections = []
        for letter, source in sources.items():
            (tmp_path / f"section_{letter}.py").write_text(source)
            sections.append(
                Section(
                    letter=letter, title=letter, module=f"section_{letter}", cuda_s=1.0,
                    cpu_s=deadline if letter == "h" else 60.0, product=False,
                )
            )  # fmt: skip
        setting = Setting(device="cpu", tiny=True, out=str(tmp_path))
        lines = []
        results = run_sections(sections, setting, hardware={}, command="test", time_limit=time_limit, tell=lines.append)
        assert len(lines) == len(sources)
        return {letter: [row for row in results.rows if row.section == letter] for letter in sources}, results

    return call


def test_a_section_that_hangs_is_killed_with_its_children_and_the_next_one_runs(run, tmp_path):
    start = time.monotonic()
    rows, results = run({"h": HANGS, "w": WORKS}, deadline=3.0)
    assert time.monotonic() - start < 60
    child, hanging = rows["h"]
    assert hanging.verdict == "failed" and "killed at its deadline of 3 s" in hanging.reason
    assert "now it hangs" in hanging.reason
    assert not psutil.pid_exists(int(child.value)) or psutil.Process(int(child.value)).status() == "zombie"
    assert [row.verdict for row in rows["w"]] == ["pass"] and not results.good
    assert "killed at its deadline" in (tmp_path / MARKDOWN_FILE).read_text()


def test_a_section_that_raises_dies_or_is_silent_has_failed(run):
    rows, results = run({"r": RAISES, "d": DIES, "s": SILENT, "w": WORKS})
    assert [(row.verdict, row.what) for row in rows["r"]] == [("pass", "before"), ("failed", "the section")]
    assert "RuntimeError: out of luck" in rows["r"][1].reason
    assert "ended with status 9" in rows["d"][0].reason and "last words" in rows["d"][0].reason
    assert rows["s"][0].reason == "it reported nothing"
    assert [end.letter for end in results.sections] == ["r", "d", "s", "w"]


def test_the_time_limit_holds_for_all_sections_together(run):
    rows, results = run({"h": HANGS, "w": WORKS}, deadline=60.0, time_limit=8.0)
    assert [row.verdict for row in rows["h"]] == ["measured", "not run"]
    assert "--time-limit was over" in rows["h"][1].reason
    assert [row.verdict for row in rows["w"]] == ["not run"] and results.good


# ---- parts ----


@pytest.mark.parametrize("name", ["QWEN3_0_6B", "QWEN3_1_7B", "QWEN3_4B", "QWEN3_8B", "TINY", "TINY_TEACHER"])
def test_shapes_are_those_of_their_config(tmp_path, name):
    arch = getattr(shapes, name)
    assert load_architecture(shapes.write_hf_config(arch, tmp_path / name)) == arch


@pytest.mark.parametrize("arch", [shapes.TINY, shapes.TINY_TEACHER], ids=["tied", "untied"])
def test_flops_and_parameters_are_those_of_transformers_model(tmp_path, arch):
    """The oracle counts the model's own matrices, and pairs of tokens one by one."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shapes.write_hf_config(arch, tmp_path)))
    linear = [
        module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    matrices = sum(module.weight.numel() for module in linear)
    assert flops.num_parameters(arch) == sum(parameter.numel() for parameter in model.parameters())
    lengths, labels = [5, 1, 3], 4
    pairs = sum(1 for length in lengths for query in range(length) for key in range(length) if key <= query)
    products = 2 * matrices * 9 + 2 * arch.vocab_size * arch.hidden_size * labels
    attention = pairs * arch.num_layers * arch.num_attention_heads * 2 * 2 * arch.head_dim
    assert flops.forward_flops(arch, lengths, labels) == products + attention


def test_peaks_by_name():
    names = ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "Tesla T4"]
    assert [flops.peak_of(name) for name in names] == [989e12, 989e12, 756e12, 835e12, None]


def test_a_trace_has_kernels_gaps_and_waits():
    def event(category, name, start, length):
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length}

    found = trace.read(
        [
            event("kernel", "gemm", 100.0, 50.0), event("kernel", "row", 155.0, 5.0), event("kernel", "gemm", 190.0, 10.0),
            event("gpu_memcpy", "copy", 150.0, 20.0), event("cuda_runtime", "cudaStreamSynchronize", 0.0, 1.0),
            event("cuda_runtime", "cudaLaunchKernel", 0.0, 1.0), event("cuda_runtime", "cudaMemcpyAsync", 0.0, 1.0),
            event("cuda_runtime", "cudaDeviceSynchronize", 0.0, 1.0), event("cpu_op", "aten::mm", 0.0, 90.0),
            {"ph": "i", "cat": "kernel", "name": "no duration", "ts": 0.0},
        ]
    )  # fmt: skip
    assert [(kernel.name, kernel.count, kernel.microseconds) for kernel in found.kernels] == [
        ("gemm", 2, 60.0), ("copy", 1, 20.0), ("row", 1, 5.0),
    ]  # fmt: skip
    assert found.gaps == () and found.span_us == 100.0 and found.waits == ("cudaStreamSynchronize",)
    later = trace.read([event("kernel", "a", 0.0, 1.0), event("kernel", "b", 30.0, 1.0)])
    assert later.gaps == (29.0,)


def test_waits_are_counted_by_place():
    def work():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    modes = []
    with (
        patch.object(host_waits.platform, "is_cuda", lambda: True),
        patch.object(torch.cuda, "synchronize", lambda: None),
        patch.object(torch.cuda, "set_sync_debug_mode", modes.append),
    ):
        found = host_waits.host_waits(work)
    assert modes == ["warn", "default"] and found.total() == 2
    assert all("test_gpu_acceptance.py" in place and place.endswith(" work") for place in found)


def test_digests_notice_a_bit_and_the_order():
    left, right = torch.arange(5, dtype=torch.bfloat16), torch.ones(3)
    changed = left.clone()
    changed.view(torch.int16)[4] ^= 1
    assert digest([left, right]) == digest([left.clone(), right.clone()])
    assert (
        len({digest([left, right]), digest([changed, right]), digest([right, left]), digest([left.flip(0), right])})
        == 4
    )


def test_an_error_on_one_shard_is_the_error():
    def work(shard):
        if shard.index == 1:
            raise KeyError("broken")
        return shard.sum(torch.ones(2))

    with pytest.raises(KeyError, match="broken"):
        on_shards(3, 10, None, 1, work)
    assert [value.tolist() for value in on_shards(3, 10, None, 1, lambda shard: shard.sum(torch.ones(2)))] == [
        [3.0, 3.0]
    ] * 3


# ---- the command ----


@pytest.mark.slow
@pytest.mark.thorough
def test_every_section_runs_on_a_cpu(tmp_path):
    """The sections of the real command, in the order of a GPU, with tiny shapes."""
    words = ["tools/gpu_acceptance.py", "--device", "cpu", "--tiny", "--out", str(tmp_path), "--time-limit", "540"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words], cwd=ROOT, env={**environment(), "PYTHONPATH": ""},
        capture_output=True, text=True, timeout=580, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    found = json.loads((tmp_path / JSON_FILE).read_text())
    assert [end["letter"] for end in found["sections"]] == [section.letter for section in SECTIONS]
    assert all(end["how"] == "ended" for end in found["sections"])
    by_section = {section.letter: [r for r in found["rows"] if r["section"] == section.letter] for section in SECTIONS}
    for letter, rows in by_section.items():
        verdicts = [row["verdict"] for row in rows]
        assert "failed" not in verdicts and "miss" not in verdicts, rows
        assert ("pass" in verdicts) == (letter not in "bi"), "b measures; i needs a server"
    assert by_section["i"][0]["verdict"] == "not run"
    assert (tmp_path / MARKDOWN_FILE).read_text() in done.stdout
    assert os.listdir(tmp_path / "sections")
