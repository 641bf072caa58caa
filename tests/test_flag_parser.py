"""No command takes the beginning of a flag for the flag: what looks at a command line knows whole names only."""

from __future__ import annotations

import argparse
import ast

import pytest

from megatron_tropd.cli import ConfigError, parse
from megatron_tropd.flag_parser import FlagParser
from megatron_tropd.reporting.redaction import HIDDEN, redact_argv
from megatron_tropd.sandbox import __main__ as sandbox
from megatron_tropd.sglang.server_flags import BENCHMARK_FLAGS, ENGINE_FLAGS, TEACHER_FLAGS, WRITER_FLAGS
from tests.test_house_style import ROOT

COMMANDS = [
    path
    for folder in ("megatron_tropd", "checkpoint_convert", "tools", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "argparse" in path.read_text(encoding="utf-8") or "FlagParser" in path.read_text(encoding="utf-8")
]


def test_a_flag_is_taken_by_its_whole_name_only(capsys):
    parser = FlagParser()
    parser.add_argument("--api-key")
    parser.add_subparsers().add_parser("other").add_argument("--secret")
    assert parser.parse_args(["--api-key=x"]).api_key == "x"
    for words in (["--api-k", "x"], ["--api-k=x"], ["other", "--sec", "x"]):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
    capsys.readouterr()
    with pytest.raises(TypeError):
        FlagParser(allow_abbrev=True)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_has_this_parser(path):
    """Of the package, of the tools and of the examples; but the sandbox, a copy of whose folder works alone."""
    if path.name == "flag_parser.py":
        return
    if path == ROOT / "megatron_tropd/sandbox/__main__.py":
        assert not sandbox.parser().allow_abbrev
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        made = [node.func] if isinstance(node, ast.Call) else node.bases if isinstance(node, ast.ClassDef) else []
        assert not any(ast.unparse(name).endswith("ArgumentParser") for name in made), "use FlagParser"
        if isinstance(node, ast.ImportFrom) and node.module == "argparse":
            assert "ArgumentParser" not in [alias.name for alias in node.names], "use FlagParser"


def test_the_commands_are_found():
    assert len(COMMANDS) > 25 and argparse.ArgumentParser in FlagParser.__mro__


@pytest.mark.parametrize("word", ["--sglang-api-k", "--sglang-admin-api-k=s3cret", "--teacher-sglang-trust-remote"])
def test_sglang_takes_abbreviations_so_they_are_refused_before_it_sees_them(word):
    """Its parser would take ``--api-k``; a key would stand in its command line, and code of a checkpoint could run."""
    flags = TEACHER_FLAGS if word.startswith("--teacher") else ENGINE_FLAGS
    reason = flags.refusal("--" + word.removeprefix(flags.prefix))
    assert "SGLang takes it for --" in reason and "s3cret" not in reason


@pytest.mark.parametrize("flags", [ENGINE_FLAGS, TEACHER_FLAGS, WRITER_FLAGS, BENCHMARK_FLAGS], ids=lambda f: f.what)
def test_every_beginning_of_a_refused_flag_is_refused(flags):
    for whole in flags.refused:
        assert all(flags.refusal(whole[:length]) for length in range(3, len(whole) + 1)), whole
        assert flags.refusal(f"{whole}=1") == flags.refused[whole]
        assert not flags.refusal(f"{whole}-of-another")
    assert not flags.refusal("api-key") and not flags.refusal("--max-total-tokens")


@pytest.mark.parametrize("words", [["--save-interv=4"], ["--wandb-proj", "x"]])
def test_the_training_command_refuses_an_abbreviation(words):
    with pytest.raises(ConfigError, match="unknown flag --"):
        parse(words)


def test_a_secret_is_hidden_in_every_form():
    argv = [
        "--sglang-api-key",
        "a1",
        "--x-api-key=b2",
        "--hf-token",
        "c3",
        "d4",
        "--lr",
        "1e-6",
        "--secret=e=5",
        "--seed=1",
    ]
    assert redact_argv(argv) == [
        "--sglang-api-key", HIDDEN, f"--x-api-key={HIDDEN}", "--hf-token", HIDDEN, HIDDEN, "--lr", "1e-6",
        f"--secret={HIDDEN}", "--seed=1",
    ]  # fmt: skip
