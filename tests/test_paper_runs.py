"""examples/paper: what its scripts make of their words, what a table skips, and what they say is wrong.

That they train: tests/test_slurm_scripts.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tropd.benchmarks.flags import parser as benchmark_parser
from megatron_tropd.cli import parse
from tools import paper_table
from tools.paper.recipes import read_tables
from tools.paper.table_run import Options, TableRun

ROOT = Path(__file__).resolve().parent.parent
PAPER = ROOT / "examples" / "paper"

LAUNCH = r"""
# Stands for train.sh where only the order of rows is of interest: what a row leaves behind, without training.
set -euo pipefail
while (($#)); do
    case "$1" in
        --row) row="$2" && shift 2 ;;
        --out) out="$2" && shift 2 ;;
        *) shift ;;
    esac
done
echo "${row} ${out##*/}" >>"${LOG}"
mkdir -p "${out}/run/hf_export"
step() { echo "{\"kind\": \"step\", \"step\": $1}" >>"${out}/run/metrics.jsonl"; }
step 1
if [[ "${row}" != "${STOPS:-}" ]]; then step 2; fi
if [[ "${row}" == "${FAILS:-}" ]]; then exit 17; fi
echo '{}' >"${out}/run/hf_export/config.json"
"""


@pytest.fixture
def table(tmp_path, monkeypatch):
    """(call of run_table.sh's command, rows that were launched since the last one)."""
    script, log = tmp_path / "launch.sh", tmp_path / "log"
    script.write_text(LAUNCH)
    monkeypatch.setenv("LOG", str(log))
    monkeypatch.setenv("SMALL_WORLD", str(tmp_path))

    def call(*words, how=("--smoke",), **environment):
        log.write_text("")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        before = signal.getsignal(signal.SIGTERM)
        try:
            code = paper_table.main([*how, "--out", str(tmp_path / "out"), "--launch", f"bash {script}", *words])
        finally:
            signal.signal(signal.SIGTERM, before)
            for name in environment:
                monkeypatch.delenv(name)
        return code, log.read_text().splitlines()

    return call


def test_a_table_skips_what_is_done_and_goes_on_after_failures(table, tmp_path, capsys):
    names = ["opd", "aopd", "tropd", "tropd_aopd"]
    assert table("6", FAILS="opd", STOPS="aopd") == (1, [f"{name} seed-1" for name in names])
    printed = capsys.readouterr().out
    assert "[FAILED] table6 skywork-math opd seed 1: training ended with exit code 17" in printed
    assert "aopd seed 1: training ended with exit code 0, but" in printed and "3 of 5 rows are done" in printed
    assert printed.rstrip().splitlines()[-1].startswith("[FAILED] table6 skywork-math aopd"), "failures come last"
    assert table("6") == (0, ["opd seed-1", "aopd seed-1"]), "only what is missing, in the table's order"
    assert table("6", "--seeds", "1", "2", "--rows", "tropd") == (0, ["tropd seed-2"])
    assert table("6", "--rows", "tropd_aopd_union", "--readings") == (0, ["tropd_aopd_union seed-1"])
    row = tmp_path / "out" / "table6" / "skywork-math" / "tropd_aopd" / "row.json"
    assert json.loads(row.read_text()) == {
        "table": "table6", "setting": "skywork-math", "row": "tropd_aopd", "title": "TrOPD + AOPD",
        "method_flags": {"objective": "tropd_aopd"},
    }  # fmt: skip


def test_a_row_of_two_tables_is_trained_once(table, tmp_path):
    assert table("6", "--rows", "opd", "tropd", FAILS="tropd")[0] == 1
    assert table("5", "--rows", "opd", "tropd") == (0, ["tropd seed-1"]), "what is not complete is not taken"
    link = tmp_path / "out" / "table5" / "skywork-math" / "opd" / "seed-1"
    assert link.is_symlink() and link.resolve() == tmp_path / "out" / "table6" / "skywork-math" / "opd" / "seed-1"
    assert json.loads((link.parent / "row.json").read_text())["table"] == "table5"
    link.resolve().rename(tmp_path / "moved")
    assert table("5", "--rows", "opd") == (0, ["opd seed-1"]) and not link.is_symlink()
    assert table("3", "--settings", "skywork-three-domains", "--rows", "opd") == (0, ["opd seed-1"]), "other models"


def test_a_run_of_other_flags_is_not_taken_for_the_row(table, tmp_path, capsys):
    assert table("6", "--rows", "opd")[0] == 0
    run = tmp_path / "out" / "table6" / "skywork-math" / "opd" / "seed-1" / "run"
    (run / "config.yaml").write_text("objective: opd\nlr: 1e-4\ntrain-iters: 2\ntop-k: 8\nrollout-batch-size: 4\n"
                                     "n-samples-per-prompt: 2\nseed: 99\n")  # fmt: skip
    code, launched = table("6", "--rows", "opd")
    assert (code, launched) == (1, []) and "(--lr 0.0001, now 5e-06): move it" in capsys.readouterr().out
    assert table("6", "--rows", "opd", "--", "--lr", "1e-4") == (0, []), "flags behind -- are the row's too"


@pytest.mark.slow
def test_a_row_is_done_when_it_is_evaluated(table, tmp_path, capfd):
    """The benchmark command itself, which finds no data."""
    how = ("--benchmark-data", str(tmp_path / "missing"))
    words = ["4", "--rows", "student", "opd", "--", "--train-iters", "2"]
    setting = tmp_path / "out" / "table4" / "qwen3"
    whole = json.dumps({name: {} for name in read_tables().settings["qwen3"].benchmarks})
    for row, summary in (("student", whole), ("opd", '{"aime24": {}}')):
        output = setting / row / "seed-1" / "benchmark"
        output.mkdir(parents=True)
        (output / "summary.json").write_text(summary)
    assert table(*words, how=how) == (1, ["opd seed-1"])
    printed = capfd.readouterr()
    assert "[ok] table4 qwen3 student seed 1: was evaluated" in printed.out
    assert "opd seed 1: the benchmarks ended with exit code 2" in printed.out and "Traceback" not in printed.err
    (setting / "opd" / "seed-1" / "benchmark" / "summary.json").write_text(whole)
    assert table(*words, how=how) == (0, [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["2"], "table 'table2' has no results; choose one of table1, table3"),
        (["1", "--rows", "grpo"], "--rows grpo: table1 has student, opd, fkl"),
        (["4", "--settings", "skywork-math"], "--settings skywork-math: table4 has qwen3"),
        (["1", "--", "--learning-rate", "1"], "unknown flag --learning-rate"),
    ],
)
def test_words_that_cannot_be_meant(table, words, message, capsys):
    assert table(*words) == (2, [])
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out


def test_benchmarks_need_their_data(tmp_path, capsys):
    assert paper_table.main(["1", "--out", str(tmp_path)]) == 2
    assert "--benchmark-data is missing" in capsys.readouterr().err


def test_words_for_the_benchmarks(tmp_path, monkeypatch):
    """One command a row: the run's export, or for an untrained model its directory."""
    tables = read_tables()
    options = Options(
        out=tmp_path, seeds=(1,), launch=(), small_world=None, benchmark=("--data-dir", "data"), trainer_flags=()
    )
    run = TableRun(tables=tables, options=options)
    lines = {line.row.name: run.benchmark_words(line, tmp_path) for line in tables.of("table4")}
    assert lines["tropd"][3:5] == ["--run-dir", str(tmp_path / "run")]
    assert lines["student"][3:5] == ["--hf-checkpoint", "runs/paper/sft-student/run/hf_export"]
    monkeypatch.setenv("TEACHER", "/models/teacher")
    assert run.benchmark_words(tables.of("table4")[1], tmp_path)[3:5] == ["--hf-checkpoint", "/models/teacher"]
    for words in lines.values():
        args, rest = benchmark_parser().parse_known_args(words[3:])
        assert not rest and args.benchmarks == list(tables.settings["qwen3"].benchmarks)
        assert args.paper_setting == ["qwen3"] and args.output == tmp_path / "benchmark"


def _bash(script, *words, timeout=60, **environment):
    own = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "PYTHONWARNINGS": "ignore", **environment}
    return subprocess.run(
        ["bash", str(PAPER / script), *words], env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["--setting", "qwen3"], {}, "--out is missing"),
        (["--out"], {}, "--out needs a value"),
        (["--out", "OUT"], {}, "PROMPTS is not set"),
        (["--out", "OUT", "--setting", "qwen"], {"PROMPTS": "p"}, "--setting 'qwen': choose one of skywork-math"),
        (
            ["--out", "OUT", "--setting", "qwen3", "--row", "student"],
            {"PROMPTS": "p"},
            "--row 'student': choose one of",
        ),
        (["--out", "OUT", "--setting", "sft-student", "--row", "opd"], {"PROMPTS": "p"}, "leave out --row"),
    ],
)
def test_what_train_sh_says_of_its_words(tmp_path, words, environment, message):
    done = _bash("train.sh", *[str(tmp_path / "out") if word == "OUT" else word for word in words], **environment)
    assert done.returncode == 2 and message in done.stdout and "Traceback" not in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_train_sh_on_a_machine_with_eight_gpus(tmp_path):
    """The words that torchrun gets; an interpreter that writes them down stands in its place."""
    stub, words = tmp_path / "python", tmp_path / "words"
    stub.write_text(f"""#!/usr/bin/env bash
if [[ "$1" == *paper_recipe.py ]]; then exec {sys.executable} "$@"; fi
printf '%s\\0' "$@" >{words}
""")
    stub.chmod(0o755)
    more = {"PYTHON": str(stub), "PROMPTS": "p.jsonl", "STUDENT": "/s", "SGLANG_PYTHON": "/sglang/python"}
    out = ["--out", str(tmp_path / "out")]
    done = _bash("train.sh", "--setting", "qwen3", "--row", "jsd", *out, "--seed", "3", **more)
    assert done.returncode == 0, done.stdout
    launcher, argv = (part.strip("\0").split("\0") for part in words.read_text().split("megatron_tropd.train"))
    assert launcher == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8", "-m"]
    config = parse(argv)
    assert config.logging.run_dir == str(tmp_path / "out" / "run") and config.training.seed == 3
    assert (config.objective.objective, config.data.prompt_data) == ("jsd", ["p.jsonl"])
    assert config.model.hf_checkpoint == "/s" and config.engine.sglang_python == "/sglang/python"
    assert config.teacher.teacher_hf_checkpoint == "runs/paper/grpo-teacher/run/hf_export", "the setting's own"
    assert config.model.bf16 and config.engine.rollout_engine == "sglang" and config.method.top_k == 64
