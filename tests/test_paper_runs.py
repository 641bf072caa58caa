"""examples/paper: what its scripts make of their words, what a table skips, and what they say is wrong.

That they train: tests/test_slurm_scripts.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tropd.benchmark import main as benchmark
from megatron_tropd.benchmarks.flags import parser as benchmark_parser
from megatron_tropd.benchmarks.results import read_results, write_scores, write_summary
from megatron_tropd.cli import parse
from tests.benchmark_data import write_all
from tests.hf_models import save_hf_checkpoint
from tests.test_benchmark_tables import result
from tools import paper_table
from tools.paper.recipes import as_yaml, read_tables, recipe
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
    made = recipe(read_tables(), "skywork-math", "opd", tmp_path, {"seed": "99", "max-tokens-per-microbatch": "600"})
    (run / "config.yaml").write_text(as_yaml(made))
    assert table("6", "--rows", "opd") == (0, []), "another seed, and what fits a run into memory"
    for flag, was, other in (
        ("lr", "5e-06", "0.0001"), ("max-response-length", "40", "2048"), ("on-long-response", "cut", "skip"),
        ("hf-checkpoint", tmp_path / "student", "other/model"), ("prompt-data", [f"{tmp_path}/train.jsonl"], "p.jsonl"),
        ("teacher-hf-checkpoint", tmp_path / "teacher", "other/model"), ("apply-chat-template", "False", "True"),
    ):  # fmt: skip
        code, launched = table("6", "--rows", "opd", "--", f"--{flag}", *([] if other == "True" else [other]))
        now = [other] if flag == "prompt-data" else other
        assert (code, launched) == (1, []), flag
        assert f"(--{flag} {was}, now {now}): move it" in capsys.readouterr().out
    (run / "config.yaml").write_text(
        as_yaml(made | recipe(read_tables(), "skywork-math", "opd", tmp_path, {"lr": "1e-4"}))
    )
    assert table("6", "--rows", "opd", "--", "--lr", "1e-4") == (0, []), "flags behind -- are the row's too"


def test_models_and_prompts_of_the_environment_are_the_rows(table, tmp_path, monkeypatch, capsys):
    """PROMPTS, STUDENT and TEACHER, as train.sh takes them; a directory may have two names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    given = {"PROMPTS": "prompts", "STUDENT": "own/student", "TEACHER": "own/teacher"}
    words = {"how": ("--no-benchmark",), **given}
    assert table("6", "--rows", "opd", "--", "--train-iters", "2", **words)[0] == 0
    run = tmp_path / "out" / "table6" / "skywork-math" / "opd" / "seed-1" / "run"
    more = {"prompt-data": str(tmp_path / "prompts"), "hf-checkpoint": "own/student", "train-iters": "2"}
    made = recipe(read_tables(), "skywork-math", "opd", None, more | {"teacher-hf-checkpoint": "own/teacher"})
    (run / "config.yaml").write_text(as_yaml(made))
    again = ["6", "--rows", "opd", "--", "--train-iters", "2"]
    assert table(*again, **words) == (0, [])
    assert table(*again, **words | {"PROMPTS": ""}) == (0, []), "not needed for a run that is there"
    capsys.readouterr()
    assert table(*again, **words | {"STUDENT": "", "PROMPTS": "others"}) == (1, [])
    printed = capsys.readouterr().out
    assert "--hf-checkpoint own/student, now deepseek-ai/" in printed and "now ['others']" in printed


def test_a_damaged_row_does_not_end_the_table(table, tmp_path, capsys):
    assert table("6", "--rows", "opd", "aopd", "tropd")[0] == 0
    setting = tmp_path / "out" / "table6" / "skywork-math"
    with (setting / "opd" / "seed-1" / "run" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "step"}\n{"kind": "step", "st')
    (setting / "aopd" / "seed-1" / "run" / "config.yaml").write_bytes(b"lr: [\xff")
    (setting / "tropd" / "seed-1" / "run" / "hf_export" / "config.json").unlink()  # the export was ended early
    assert table("6", "--rows", "opd", "aopd", "tropd") == (1, ["tropd seed-1"])
    printed = capsys.readouterr().out
    assert "2 of 3 rows are done" in printed and "opd seed 1: was trained" in printed
    assert "aopd seed 1: " in printed and "config.yaml" in printed


@pytest.mark.slow
def test_scores_of_another_model_are_not_a_rows(table, tmp_path, capfd):
    """The benchmark command itself; no server can start, so what is complete is seen to need none."""
    models = [save_hf_checkpoint(tmp_path / f"model-{seed}", "qwen3", seed=seed) for seed in (0, 1)]
    for model in models:
        (model / "chat_template.jinja").write_text("{{ messages }}")
    flags = f"--evalscope-python {shutil.which('true')} --sglang-python {shutil.which('false')} --num-servers 1"
    data = str(write_all(tmp_path / "data"))
    how = ("--benchmark-data", data, "--benchmark-flags", flags)

    output = tmp_path / "out" / "table1" / "skywork-math" / "student" / "seed-1" / "benchmark"
    benchmarks = read_tables().settings["skywork-math"].benchmarks
    words = ["--hf-checkpoint", str(models[0]), "--benchmarks", *benchmarks, "--output", str(output)]
    assert benchmark([*words, "--data-dir", data, *flags.split()]) == 1
    for name in benchmarks:
        write_scores(output, result(name, [1.0, 0.5], 2))
    write_summary(output, list(read_results(output).values()))
    capfd.readouterr()

    row = ["5", "--rows", "student"]
    assert table(*row, how=how, STUDENT=str(models[1])) == (1, [])
    printed = capfd.readouterr()
    assert "was made with another model" in printed.err and "Traceback" not in printed.err
    assert "the files of --hf-checkpoint, --load or --run-dir are not the same" in printed.err
    assert "the benchmarks ended with exit code 2" in printed.out
    assert (tmp_path / "out" / "table5" / "skywork-math" / "student" / "seed-1").is_symlink()
    assert table(*row, how=how, STUDENT=str(models[0])) == (0, []), capfd.readouterr().err
    assert "starting" not in capfd.readouterr().err


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
