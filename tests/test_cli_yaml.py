"""Decisions about flags and YAML files, one example each; test_cli_properties.py has the many."""

from __future__ import annotations

import pytest
import yaml

from megatron_tropd.cli import ConfigError, parse, to_flags
from megatron_tropd.plain_yaml import MAX_BYTES, PlainYamlError, Word, read_plain_yaml


def _errors(argv):
    with pytest.raises(ConfigError) as caught:
        parse(argv)
    return "\n".join(caught.value.errors)


def _file(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return ["--config", str(path)]


@pytest.mark.parametrize(
    ("content", "errors"),
    [
        ("lr: 1\nlr: 2\n", ["lr: is given twice, in line 1 and in line 2"]),
        ("top_k: 1\ntop-k: 1\n", ["top-k: is given twice, in line 1 and in line 2"]),
        ("lr: 1\nlr: 2\nbf16: maybe\n", ["lr: is given twice", "bf16: 'maybe' is not true or false"]),
        ("seed: 010\n", ["seed: '010' is not an integer; write it without leading zeros"]),
        ("seed: 1:30\n", ["seed: '1:30' is not an integer"]),
        ("seed: 1_000\n", ["seed: '1_000' is not an integer"]),
        ("seed: 0x10\n", ["seed: '0x10' is not an integer"]),
        ("train-iters: 1.5\n", ["train-iters: '1.5' is not an integer"]),
        ("seed: 12345678901234567890123\n", ["seed: '12345678901234567890123' is not an integer"]),
        ("lr: .nan\n", ["lr: '.nan' is not a finite number"]),
        ("lr: .inf\n", ["lr: '.inf' is not a finite number"]),
        ("lr: 1e400\n", ["lr: '1e400' is too large"]),
        ("lr: 1e-400\n", ["lr: '1e-400' is too small"]),
        ("lr: on\n", ["lr: 'on' is not a number"]),
        ("lr: [1]\n", ["lr: has a list of 1; expected one value"]),
        ("lr: {a: 1}\n", ["lr: has a mapping in line 1; expected one word or a list of words"]),
        ("prompt-data: [[a]]\n", ["prompt-data: has a list in line 1; expected a list of words"]),
        ("prompt-data: [a, ~]\n", ["prompt-data: has no value"]),
        ("prompt-data: [a, '']\n", ["prompt-data: has an empty value"]),
        ("prompt-key: ''\n", ["prompt-key: has an empty value"]),
        ("run-dir: ~\n", ["run-dir: has no value; give one or leave the line out"]),
        ("run-dir: \"a\\0b\"\n", ["run-dir: 'a\\x00b' holds a NUL character"]),
        ("run-dir: \"\\ud800\"\n", ["run-dir: '\\ud800' is not valid UTF-8 text"]),
        ("run-dir: \"\\UFFFFFFFF\"\n", ["is not valid YAML"]),
        ("run-dir: !!python/object/apply:os.system [x]\n", ["run-dir: has a list in line 1"]),
        ("run-dir: !!python/name:os.system x\n", ["run-dir: has the tag tag:yaml.org,2002:python/name:os.system"]),
        ("seed: !!int '3'\n", ["seed: has the tag tag:yaml.org,2002:int; write the plain value without it"]),
        ("<<: {lr: 1}\n", ["<<: has a mapping"]),
        ("? [a]\n: 1\n", ["line 1: a key must be one word"]),
        ("~: 1\n", ["unknown key in"]),
        ("lr: 1\n\tseed: 2\n", ["is not valid YAML in line 2"]),
        ("lr: *x\n", ["is not valid YAML in line 1: found undefined alias 'x'"]),
        ("--- \nlr: 1\n---\nlr: 2\n", ["expected a single document"]),
        ("- lr\n", ["holds a list, expected a mapping of flag: value"]),
        ("lr\n", ["holds a word, expected a mapping of flag: value"]),
        (b"lr: \xff\n", ["byte 4 is not UTF-8 text"]),
        ("lr: 1\n".encode("utf-16"), ["is not UTF-8 text"]),
        ("[" * 5000, ["is not valid YAML"]),
        ("a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n", ["b: has a list in line 1; expected a list of words"]),
        ("#" * (MAX_BYTES + 1), ["has more than 1048576 bytes"]),
        ("sglang-x: no\n", ["sglang-x: write true or false for a flag without a value, or the word in quotes: 'no'"]),
        ("sglang-x: []\n", ["sglang-x: has an empty list"]),
        ("sglang-x: [a, ~]\n", ["sglang-x: has a list with a missing value"]),
        ("outlier-coef: -1\n", ["--outlier-coef -1.0 must not be negative"]),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_what_a_file_may_not_hold(tmp_path, content, errors):
    found = _errors(_file(tmp_path, content))
    for error in errors:
        assert error in found


@pytest.mark.parametrize(
    ("content", "flag", "value"),
    [
        ("lr: 1e-5\n", "lr", 1e-5),
        ("train-iters: 200.0\n", "train-iters", 200),
        ("bf16: Yes\n", "bf16", True),
        ("bf16: 'off'\n", "bf16", False),
        ("run-dir: 2024-1-1\n", "run-dir", "2024-1-1"),
        ("run-dir: no\n", "run-dir", "no"),
        ("run-dir: 'null'\n", "run-dir", "null"),
        ("prompt-key: 1.50\n", "prompt-key", "1.50"),
        ("run-dir: runs/\u540d\n", "run-dir", "runs/\u540d"),
        ("save: ''\n", "save", ""),
        ("prompt-data: a.jsonl\n", "prompt-data", ["a.jsonl"]),
        ("prompt-data: [on, 010, 'a b']\n", "prompt-data", ["on", "010", "a b"]),
        ("guidance: none\n", "guidance", "none"),
        ("\ufefflr: 1\n", "lr", 1.0),
        ("sglang-x: 'on'\n", "sglang-x", "on"),
        ("sglang-x: 010\n", "sglang-x", "010"),
        ("sglang-x: true\n", "sglang-x", True),
        ("sglang-x: [a, 1e5]\n", "sglang-x", ["a", "1e5"]),
        ("eval-data: &files [a, b]\nprompt-data: *files\n", "prompt-data", ["a", "b"]),
    ],
)
def test_a_word_is_what_is_written(tmp_path, content, flag, value):
    config = parse(_file(tmp_path, content))
    found = to_flags(config)[flag]
    assert found == value and type(found) is type(value)
    assert parse(_file(tmp_path, yaml.safe_dump(to_flags(config)))) == config


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--lr", "nan"], "--lr: 'nan' is not a finite number"),
        (["--seed", "\u0663"], "--seed: '\u0663' is not an integer"),
        (["--save="], "--save: the value is empty; give one or leave the flag out"),
        (["--prompt-data", "a", ""], "--prompt-data: the value is empty"),
        (["--prompt-data", "a", "--prompt-data", "b"], "--prompt-data is given twice; give it once, with all its values"),
        (["--config", "a", "--config", "b"], "--config is given twice"),
        (["--config="], "--config: the value is empty"),
        (["--config", "a\0b"], "--config: 'a\\x00b' holds a NUL character"),
        (["--config", "x" * 5000], "File name too long"),
        (["--config", "/"], "--config /: Is a directory"),
        (["--config", "/dev/zero"], "has more than 1048576 bytes"),
        (["--bf16", "false"], "unexpected argument 'false' after --bf16, which takes no value"),
        (["--bf16=false"], "--bf16"),
        (["--lr", "1", "2"], "unexpected argument '2' after --lr, which takes one value"),
        (["--lr", "1", "--bf16", "1"], "unexpected argument '1' after --bf16"),
        (["--run-dir", "--lr 5"], "'--lr 5' is one word; a flag and its value are two"),
        (["--prompt-data", "a", "--seed 3", "--lr", "1"], "'--seed 3' is one word"),
        (["--lr", "1e-310"], "--lr: '1e-310' is too small for a floating-point number"),
        (["--no-lr"], "unknown flag --no-lr; did you mean --lr?"),
        (["--train-iter", "3"], "unknown flag --train-iter; did you mean --train-iters?"),
        (["--min-lr", "-1e-5"], "write a value that begins with a dash as --flag=-value"),
        (["--sglang-x", "a\udcff"], "--sglang-x: 'a\\udcff' is not valid UTF-8 text"),
        (["--sglang-\u00e9", "a"], "expected the name of an SGLang flag"),
        (["--outlier-coef=-1"], "--outlier-coef -1.0 must not be negative"),
    ],
)  # fmt: skip
def test_what_a_command_line_may_not_hold(argv, error):
    assert error in _errors(argv)


def test_the_last_of_several_values_counts_and_an_empty_word_is_sglangs(tmp_path):
    config = parse(
        ["--lr", "1", "--bf16", "--lr", "2", "--no-bf16", "--sglang-x=", "--sglang-y", "1", "--sglang-y", "2"]
    )
    assert (config.training.lr, config.model.bf16) == (2.0, False)
    assert dict(config.sglang_flags) == {"x": ("",), "y": ("2",)}


def test_a_plain_file_knows_no_types(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("a_b: 010\nc: [on, '~', ~]\n")
    assert read_plain_yaml(path) == {
        "a-b": Word("010", False), "c": (Word("on", False), Word("~", True), Word("~", False))
    }  # fmt: skip
    path.write_text("a: 1\nb: {c: secret}\n")
    with pytest.raises(PlainYamlError) as caught:
        read_plain_yaml(path)
    assert caught.value.settings == {"a": Word("1", False)} and "secret" not in str(caught.value)
