"""Whatever the command line and the YAML file hold: the configuration that they say, or errors that name flags.

Hypothesis makes the inputs, the same ones in every run.  What a text means is decided here by exact fractions, not by the
code under test.
"""

from __future__ import annotations

import json
import math
import re
import typing
from fractions import Fraction

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_tropd.cli import ConfigError, parse, sections, to_flags
from megatron_tropd.config import TrainConfig
from megatron_tropd.objectives.methods import METHODS, make_objective
from megatron_tropd.setup.checks import check_method, check_numbers
from megatron_tropd.setup.engine_checks import check_engine_flags
from megatron_tropd.setup.path_checks import check_directories
from megatron_tropd.setup.problems import Problems
from megatron_tropd.setup.ranges import RANGES, Range

DEFAULTS = to_flags(TrainConfig())
KINDS = {
    f.replace("_", "-"): kind
    for cls in sections().values()
    for f, kind in typing.get_type_hints(cls).items()
    if f.replace("_", "-") in DEFAULTS
}
NUMBERS = [name for name, kind in KINDS.items() if kind in (int, float)]
FILES = [name for name, kind in KINDS.items() if kind == list[str]]
SWITCHES = [name for name, kind in KINDS.items() if kind is bool]

ODD_WORDS = [
    "on", "off", "yes", "no", "y", "n", "true", "True", "FALSE", "null", "~", "none", "None", "1e-5", "1e5", "5.", ".5",
    "010", "0o10", "0x10", "0b1", "1_000", "1:30", "1:30.5", "190:20:30", "2024-01-01", "2024-1-1", ".inf", "-.inf", ".nan",
    "inf", "-inf", "nan", "NaN", "Infinity", "1e400", "-1e400", "1e-400", "1e999999999999", "0", "-0", "-1", "+3", "1.0",
    "2.5", "1" * 30, "9" * 19, "-" + "9" * 5000, "0." + "3" * 5000, "1,5", "1 000", "3%", "\u0663", "\uff13", "\u00bd",
    "cosine", "auto", "threshold", "a b", "a\tb", " ", "x" * 100_000, "\u00e9\u4e2d\U0001f600", "caf\u0065\u0301", "=", "<<",
    "{}", "[]", "#", "%", "a: b", "- a", "*x", "&x", "!x", "@x", "`x`", "'", '"', "\\", "\\x00", "$HOME", "a\\b", ": ", "? x",
]  # fmt: skip
BROKEN_WORDS = ["a\0b", "\0", "\ud800", "a\udcff", ""]
texts = st.one_of(
    st.sampled_from(ODD_WORDS), st.sampled_from(ODD_WORDS + BROKEN_WORDS), st.integers().map(str), st.floats().map(repr),
    st.floats(0, 2).map(repr), st.integers(0, 300).map(str), st.text(st.characters(categories=("L", "N", "P", "Z", "Cc")), max_size=8),
    st.sampled_from([word for kind in KINDS.values() for word in typing.get_args(kind) if isinstance(word, str)]),
)  # fmt: skip


def _suited(kind):
    """Texts that are mostly good for a flag of this kind, so that many inputs are accepted."""
    if kind is int:
        return st.one_of(st.integers(0, 10**6).map(str), texts)
    if kind is float:
        return st.one_of(st.floats(0, 2).map(repr), st.sampled_from(["1e-5", "5.", ".5", "1E3", "0", "+0.25"]), texts)
    if kind is bool:
        return st.sampled_from(["true", "False", "YES", "no", "on", "OFF", "1", ""])
    words = typing.get_args(kind)
    choices = [word for part in words for word in (typing.get_args(part) or (part,)) if isinstance(word, str)]
    return st.sampled_from([*choices, "auto"]) if choices else texts


def _misspell(name):
    return st.sampled_from(
        [name[:-1], name[1:], name + "s", name.upper(), name.replace("-", "_"), name.replace("-", ""), "no-" + name,
         name[: len(name) // 2], "sglang-" + name, "", "-", "config", name + " ", "\u00fc" + name, name + "=", "x" * 5000]
    )  # fmt: skip


names = st.one_of(
    st.sampled_from(list(KINDS)), st.sampled_from(NUMBERS), st.sampled_from(FILES + SWITCHES),
    st.sampled_from(["sglang-mem-fraction-static", "sglang-attention-backend", "sglang-x", "teacher-sglang-x"]),
    st.sampled_from(list(KINDS)).flatmap(_misspell),
)  # fmt: skip
many = settings(
    max_examples=1000, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


def _meaning(kind, text):
    """The value of a text as (kind, exact value), or None where it is not one."""
    if kind in (int, float):
        if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text, re.ASCII):
            return None
        exponent = re.search(r"[eE]([+-]?\d+)$", text)
        return Fraction(text) if not exponent or abs(int(exponent[1])) < 400 else None
    if kind is bool:
        return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(text.lower())
    return text


def _same(kind, value, text):
    meaning = _meaning(kind, text)
    if kind is float and meaning is not None:
        return math.isfinite(value) and abs(Fraction(value) - meaning) <= abs(meaning) / 2**52
    return meaning is not None and type(value) is kind and value == meaning if kind in (int, bool) else value == meaning


def _holds(config, name, words):
    """Whether the configuration holds exactly the words that were given."""
    value = to_flags(config)[name]
    if KINDS[name] == list[str]:
        return value == list(words)
    return len(words) == 1 and _same(KINDS[name], value, words[0])


def _check_config(config, given_names):
    """What holds for every configuration: it reads back, nothing else changed, and the pure checks do not fail."""
    flags = to_flags(config)
    again = yaml.dump(flags, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))
    path = _check_config.path
    path.write_text(again, encoding="utf-8")
    assert parse(["--config", str(path)]) == config
    for name, default in DEFAULTS.items():
        assert name in given_names or flags[name] == default, f"{name} was not given"
    problems = Problems()
    check_numbers(config, problems)
    check_engine_flags(config, problems)
    check_directories(config, problems)
    objective = problems.attempt(lambda: make_objective(config.objective.objective, config.objective_settings))
    if objective:
        check_method(config, objective, problems)
    for error in problems.errors:
        assert "--" in error and "\0" not in error, error
    if not problems.errors:
        assert all(RANGES[name].complaint(flags[name]) is None for name in NUMBERS)


def _check_error(error, given_names):
    """Every line says which flag, key or file is meant, and is short."""
    assert error.errors
    for line in error.errors:
        assert len(line) < 2000
        assert "--" in line or "unexpected argument" in line or any(name and name in line for name in given_names), line


@pytest.fixture(scope="module", autouse=True)
def _file(tmp_path_factory):
    _check_config.path = tmp_path_factory.mktemp("round") / "resolved.yaml"


@st.composite
def command_lines(draw):
    """(words, names given, for each flag of the project the words after its last occurrence, if all are well formed)."""
    argv, given_names, last = [], [], {}
    for _ in range(draw(st.integers(1, 4))):
        name = draw(names)
        form = draw(st.sampled_from(["space", "space", "space", "equals", "alone", "several"]))
        count = {"alone": 0, "several": draw(st.integers(2, 3))}.get(form, 1)
        words = [draw(_suited(KINDS.get(name, str)) if draw(st.booleans()) else texts) for _ in range(count)]
        argv += [f"--{name}={words[0]}"] if form == "equals" else [f"--{name}", *words]
        written, equals, value = (f"{name}={words[0]}" if form == "equals" else name).partition("=")
        given_names.append(written)
        last[written] = [*([value] if equals else []), *([] if form == "equals" else words)]
    if draw(st.integers(0, 15)) == 0:
        argv.insert(0, draw(st.sampled_from(["--", "stray", "-x", "--config", "-", "---"])))
    return argv, given_names, last


@many
@given(command_lines())
def test_any_command_line(case):
    argv, given_names, last = case
    if {"-h", "--help"} & set(argv):
        return
    try:
        config = parse(argv)
    except ConfigError as error:
        _check_error(error, [name.strip("-") for name in given_names])
        return
    flags = to_flags(config)
    switches = {name.removeprefix("no-"): not name.startswith("no-") for name in given_names}  # the last one counts
    for name, words in last.items():
        if name.removeprefix("no-") in SWITCHES:
            assert not words and flags[name.removeprefix("no-")] is switches[name.removeprefix("no-")]
        elif name in KINDS:
            assert _holds(config, name, words), (name, words, flags[name])
        else:
            assert _passed_to_sglang(config, name) == tuple(words)
    _check_config(config, {n.removeprefix("no-") if n.removeprefix("no-") in SWITCHES else n for n in last})


def _passed_to_sglang(config, name):
    """The words after a flag that is passed to SGLang; None where it is not."""
    prefix = "teacher-sglang-" if name.startswith("teacher-") else "sglang-"
    assert name.startswith(prefix), f"{name} is not a flag, and was taken"
    passed = config.teacher_sglang_flags if name.startswith("teacher-") else config.sglang_flags
    return passed.get(name.removeprefix(prefix))


def _plain(text):
    """Whether a text can stand in a file without quotes, as one word."""
    return bool(re.fullmatch(r"[\w.+~\u00e9\u4e2d][\w.:+~/=$%-]*", text)) and not re.search(r":$", text)


@st.composite
def entries(draw, name):
    """(key, text of a YAML value, the words that it is or None where it is no value, whether it is quoted)."""
    text = draw(_suited(KINDS.get(name, str)) if draw(st.booleans()) else texts)
    return name, *_entry(draw, text)


def _entry(draw, text):
    style = draw(st.sampled_from(["plain", "plain", "plain", "json", "single", "list", "nested", "odd"]))
    if style == "plain" and _plain(text):
        return text, None if text in ("~", "null", "Null", "NULL") else (text,), False
    if style == "single" and re.fullmatch(r"[ -~\u00e9\u4e2d]*", text):
        return "'" + text.replace("'", "''") + "'", (text,), True
    if style == "list":
        words = [draw(texts) for _ in range(draw(st.integers(0, 3)))]
        if all(c < "\ud800" or c > "\udfff" for word in words for c in word):
            return "[" + ", ".join(json.dumps(word) for word in words) + "]", tuple(words), True
    if style == "nested":
        inner = draw(
            st.sampled_from(["[[1]]", "{a: 1}", "[{a: 1}]", "[1, [2, [3]]]", "{lr: {lr: 1}}", "[~]", "[1, null]"])
        )
        return inner, None, False
    if style == "odd":
        odd = ["!!int '3'", "!!float 1", "!!python/object:os.system x", "!!python/name:os.system", "!x y", "!!set {a}",
               "!!binary aGk=", "*missing", "", " ", "~", "!!null ''", "!!timestamp 2024-01-01"]  # fmt: skip
        return draw(st.sampled_from(odd)), None, False
    if any("\ud800" <= character <= "\udfff" for character in text):
        text = "x"
    return json.dumps(text), (text,), True


@many
@given(st.lists(names.flatmap(entries), min_size=1, max_size=3))
def test_any_yaml_file(items):
    path = _check_config.path.with_name("given.yaml")
    keys = [name for name, *_ in items]
    path.write_text("".join(f"{json.dumps(name)}: {value}\n" for name, value, _, _ in items), encoding="utf-8")
    normal = [key.replace("_", "-") for key in keys]
    try:
        config = parse(["--config", str(path)])
    except ConfigError as error:
        _check_error(error, [*normal, str(path)])
        return
    assert len(set(normal)) == len(normal), "a key that was given twice was taken"
    for name, (_, _, words, quoted) in zip(normal, items, strict=True):
        if name in KINDS:
            assert words is not None and _holds(config, name, words), (name, words, to_flags(config)[name])
        else:
            flag = _passed_to_sglang(config, name)
            if words is None or (not quoted and words[0].lower() == "false"):
                assert flag is None
            else:
                assert flag == (() if not quoted and words[0].lower() == "true" else words)
    _check_config(config, set(normal))


BASE = "lr: 5e-6\ntop-k: 3\nbf16: true\nprompt-data: [a.jsonl, b.jsonl]\nobjective: opd\nrun-dir: 'runs/x'\nsglang-x: true\n"
PIECES = [
    "\t", "\n", ": ", "- ", "[", "]", "{", "}", "&a ", "*a", "!!python/object:os.system ", "!!", "|\n", ">\n", "'", '"', "#",
    "---\n", "...\n", "%YAML 1.1\n", "? ", "<<: ", "\\", ",", "\u2028", "\ufeff", "\x00", "\x07", "lr", "top_k: 4\n", "on",
]  # fmt: skip
places = st.one_of(st.integers(0, len(BASE)), st.sampled_from([i + 1 for i, c in enumerate(BASE) if c == "\n"]))


@many
@given(st.lists(st.tuples(places, st.sampled_from(PIECES), st.sampled_from([0, 0, 1, 2, 3])), min_size=1, max_size=3),
       st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16", "latin-1"]))  # fmt: skip
def test_any_damage_to_a_yaml_file(edits, encoding):
    text = BASE
    for place, piece, cut in edits:
        text = text[:place] + piece + text[place + cut :]
    path = _check_config.path.with_name("damaged.yaml")
    path.write_bytes(text.encode(encoding, errors="replace"))
    try:
        config = parse(["--config", str(path)])
    except ConfigError as error:
        _check_error(error, [str(path)])
        return
    # PyYAML's loader without types reads the same document, so that places and quotes need no second parser here.
    document = yaml.compose(path.read_bytes().decode("utf-8-sig"), Loader=yaml.BaseLoader)
    items = [(key.value.replace("_", "-"), value) for key, value in document.value] if document else []
    assert len({name for name, _ in items}) == len(items), "a key that was given twice was taken"
    for name, value in items:
        words = [item.value for item in value.value] if isinstance(value.value, list) else [value.value]
        assert name == "sglang-x" or _holds(config, name, words), (name, words)
    _check_config(config, {name for name, _ in items})


def test_every_number_has_a_range():
    assert RANGES.keys() == set(NUMBERS)
    for name in NUMBERS:
        assert RANGES[name].complaint(DEFAULTS[name]) is None, f"the default of --{name} is out of its range"


@pytest.mark.parametrize(
    ("allowed", "good", "bad"),
    [
        (Range(1, 10), (1, 10), {0: "must be at least 1", 11: "must be at most 10", math.nan: "must be a finite number"}),
        (Range(0, 10), (0, 10), {-1: "must not be negative", math.inf: "must be a finite number"}),
        (Range(0, 10, open_low=True), (1e-300, 10), {0: "must be positive", -1: "must be positive"}),
        (Range(0, 1, open_high=True), (0, 0.999), {1: "must be in [0, 1)", -1: "must be in [0, 1)"}),
        (Range(-1, 1), (-1, 1), {-2: "must be in [-1, 1]", 2: "must be in [-1, 1]"}),
    ],
)  # fmt: skip
def test_ranges(allowed, good, bad):
    assert [allowed.complaint(value) for value in good] == [None] * len(good)
    assert {value: allowed.complaint(value) for value in bad} == bad


def test_every_method_has_finite_numbers():
    from megatron_tropd.objectives.settings import ObjectiveSettings

    for name in NUMBERS:
        if KINDS[name] is float and hasattr(ObjectiveSettings(), name.replace("-", "_")):
            for value in (math.nan, math.inf, -math.inf):
                with pytest.raises(ValueError, match=f"--{name} {value} must be a finite number"):
                    make_objective(next(iter(METHODS)), ObjectiveSettings(**{name.replace("-", "_"): value}))
