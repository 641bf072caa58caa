"""Read a configuration from flags and YAML, as the dataclasses of ``config.py`` define them.

The command line overrides YAML, and YAML overrides the defaults.  ``flag_values.py`` reads the values.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import re
import sys
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from megatron_tropd.config import TrainConfig
from megatron_tropd.config_fields import BY_ROLE
from megatron_tropd.flag_parser import FlagParser
from megatron_tropd.flag_values import check_text, choices_of, from_flag, from_yaml, shortened, show, words_of_yaml
from megatron_tropd.parallel.megatron_flags import find_field, megatron_fields, refusal
from megatron_tropd.parallel.print_once import Importance, print_once
from megatron_tropd.plain_yaml import PlainYamlError, Value, read_plain_yaml
from megatron_tropd.teacher_files import read_teachers

SGLANG_PREFIXES = {"sglang-": "sglang_flags", "teacher-sglang-": "teacher_sglang_flags"}
"""Prefix of the flags that are passed to SGLang, unless config.py defines them -> their field of TrainConfig."""
_MISSPELLED = 0.9
"""Similarity from which a name counts as a misspelled flag of ours; SGLang's ep-size and our tp-size have 0.86."""
_METAVARS = {"urls": "URL", "ids": "GPU"}
"""What ``--help`` calls the values of a list, by the last word of the flag; others are files."""
_SGLANG_NAME = re.compile(r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*")


class ConfigError(ValueError):
    """The configuration, or a file that it names, cannot be used; one message lists all errors."""

    exit_code = 2

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = tuple(dict.fromkeys(errors))  # two models may have the same complaint
        number = len(self.errors)
        count = f"{number} configuration errors" if number != 1 else "1 configuration error"
        super().__init__("\n".join([count + ":", *(f"  - {error}" for error in self.errors)]))


class _CollectingParser(FlagParser):
    """An ArgumentParser that raises ConfigError instead of exiting, and prints its help on one rank of a node."""

    def print_help(self, file: Any = None) -> None:
        print_once(self.format_help().rstrip(), Importance.CAUSE, file or sys.stdout)

    def error(self, message: str) -> typing.NoReturn:
        if message.endswith("expected one argument"):
            message += "; write a value that begins with a dash as --flag=-value"
        raise ConfigError([shortened(message, 400)])


class _Once(argparse.Action):
    """Stores the values of a flag that may be given once: a second list would silently take the place of the first."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            what = "all its values" if isinstance(values, list) else "its value"
            parser.error(f"{option} is given twice; give it once, with {what}")
        setattr(namespace, self.dest, values)


def sections() -> dict[str, type]:
    """Return the dataclass of each section, in the order of TrainConfig."""
    hints = typing.get_type_hints(TrainConfig)
    return {f.name: hints[f.name] for f in dataclasses.fields(TrainConfig) if dataclasses.is_dataclass(hints[f.name])}


@functools.cache
def _flags() -> dict[str, tuple[str, dataclasses.Field[Any], Any]]:
    """Return flag name -> (section, field, type).  A field without help text is not a flag; other sections set it."""
    flags = {}
    for section, cls in sections().items():
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if "help" not in f.metadata:
                continue
            flags[f.name.replace("_", "-")] = (section, f, hints[f.name])
    return flags


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


@functools.cache
def make_parser() -> argparse.ArgumentParser:
    """Return the command-line parser of ``megatron_tropd.train``."""
    parser = _CollectingParser(
        prog="torchrun ... -m megatron_tropd.train",
        description="Trust Region On-Policy Distillation on Megatron-core.  If a flag with one value is given several "
        "times, the last one counts; a flag with a list is given once.",
    )  # fmt: skip
    parser.add_argument(
        "--config", metavar="YAML", action=_Once, help="file whose keys are flag names; flags override it"
    )
    groups = {name: parser.add_argument_group(name, (cls.__doc__ or "").strip()) for name, cls in sections().items()}
    groups[BY_ROLE] = parser.add_argument_group(
        BY_ROLE, "How many ranks or GPUs student, teacher and engines have.  They are compared with what torchrun "
        "started and with this machine's GPUs; docs/scaling.md",
    )  # fmt: skip
    for name, (section, f, kind) in _flags().items():
        text = f"{f.metadata['help']} (default: {_default(f)!r})".replace("%", "%%")
        options: dict[str, Any] = {"dest": f.name, "default": None, "help": text}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif choices := choices_of(kind):
            options["metavar"] = "{" + ",".join(choices) + "}"
        elif kind == list[str]:
            options.update(nargs="+", metavar=_METAVARS.get(name.rpartition("-")[2], "FILE"), action=_Once)
        groups[f.metadata.get("group") or section].add_argument(f"--{name}", **options)
    return parser


def _read_yaml(path: str) -> tuple[dict[str, Value], list[str]]:
    """Return (settings, errors) of a YAML file."""
    if not path:
        return {}, ["--config: the value is empty; give a file or leave the flag out"]
    try:
        return read_plain_yaml(check_text(path)), []
    except OSError as error:
        return {}, [f"--config {shortened(path)}: {error.strerror}"]
    except PlainYamlError as error:
        return error.settings, [f"--config {path}: {line}" for line in error.errors]
    except ValueError as error:  # no path at all
        return {}, [f"--config: {error}"]


def _unknown(name: str, where: str, known: Sequence[str]) -> str:
    name = shortened(name)
    close = difflib.get_close_matches(name.removeprefix("no-"), known, n=1)
    hint = f"; did you mean {'--' if where == 'flag' else ''}{close[0]}?" if close else ""
    return f"unknown {where} {'--' if where == 'flag' else ''}{name}{hint}"


Passed = dict[str, tuple[str, ...] | None]
"""Flags that are passed on: name -> the words after it; None for a flag that YAML switches off."""


def _sglang_prefix(name: str) -> str:
    """Return the prefix by which flag ``name`` is passed to SGLang; "" where it is not."""
    return next((prefix for prefix in SGLANG_PREFIXES if name.startswith(prefix)), "")


def split_flags(argv: Sequence[str], passes: Callable[[str], bool]) -> tuple[Passed, list[str]]:
    """Return (flags whose name ``passes``, with the words after each; all other words), so that argparse sees only the
    latter."""
    passed: Passed = {}
    others: list[str] = []
    current: str | None = None
    for word in argv:
        name, given, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and passes(name):
            current = name
            passed[current] = (value,) if given else ()
        elif word.startswith("--") or current is None:
            current = None
            others.append(word)
        else:
            passed[current] = (*(passed[current] or ()), word)
    return passed, others


def _is_own(name: str) -> bool:
    """Whether ``--name`` is a flag of config.py or of argparse itself."""
    return {name, name.removeprefix("no-")} & _flags().keys() != set() or name in ("config", "help", "")


def _megatron_values(passed: Passed, errors: list[str]) -> dict[str, Any]:
    """Return the values of Megatron's own flags by name; what is wrong with them goes to ``errors``."""
    values: dict[str, Any] = {}
    for given, words in passed.items():
        found = find_field(given)
        assert found is not None and words is not None, "only flags of Megatron are passed here"
        name = found.name.replace("_", "-")
        if reason := refusal(found.name):
            errors.append(f"--{given} cannot be set: {reason}")
        elif found.kind is bool and words:
            errors.append(f"--{given} takes no value: give --{name} or --no-{name} alone")
        elif found.kind is bool:
            values[name] = given == name
        elif len(words) != 1:
            errors.append(f"--{given} is followed by {len(words)} values; expected one")
        else:
            try:
                values[name] = from_flag(words[0], found.kind)
            except ValueError as error:
                errors.append(f"--{given}: {error}")
    return values


def _megatron_of_yaml(name: str, given: Value) -> Any:
    """Return the value of a YAML key that names a field of Megatron.

    Raises:
        ValueError: it cannot be set, or not to this value.
    """
    field = megatron_fields()[name]
    if reason := refusal(field.name):
        raise ValueError(f"cannot be set: {reason}")
    return from_yaml(given, field.kind, None)


def sglang_errors(passed: Mapping[str, tuple[str, ...] | None], own: Collection[str]) -> list[str]:
    """Return errors for what cannot be flags of SGLang, and for names that look like a misspelled flag of ours."""
    errors = []
    for flag, words in passed.items():
        prefix = _sglang_prefix(flag)
        name = flag.removeprefix(prefix)
        ours = [name.removeprefix(prefix) for name in own if name.startswith(prefix)]
        for word in words or ():
            try:
                check_text(word)
            except ValueError as error:
                errors.append(f"--{prefix}{shortened(name)}: {error}")
        if not _SGLANG_NAME.fullmatch(name):
            errors.append(f"--{prefix}{shortened(name)}: expected the name of an SGLang flag, words joined by '-'")
        elif close := difflib.get_close_matches(name, ours, n=1, cutoff=_MISSPELLED):
            errors.append(f"unknown flag --{flag}; did you mean --{prefix}{close[0]}?")
    return errors


def _values_of_yaml(path: str, sglang: Passed, megatron: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return (values by flag name, errors) of a YAML file.  Its flags for SGLang and for Megatron are added to
    ``sglang`` and ``megatron``, which hold those of the command line already."""
    flags, values = _flags(), {}
    settings, errors = _read_yaml(path)
    for name, given in settings.items():
        try:
            if name in flags:
                _, f, kind = flags[name]
                values[name] = from_yaml(given, kind, _default(f))
            elif _sglang_prefix(name):
                sglang.setdefault(name, words_of_yaml(given))
            elif name in megatron_fields():
                value = _megatron_of_yaml(name, given)
                megatron.setdefault(name, value)
            else:
                errors.append(_unknown(name, f"key in {path}:", [*flags, *megatron_fields()]))
        except ValueError as error:
            errors.append(f"{path}: {name}: {error}")
    return values, errors


def _quoted_flags(argv: Sequence[str]) -> list[str]:
    """Return errors for a flag and its value quoted as one word, which argparse would take as a value of the flag
    before it."""
    return [
        f"{show(word)} is one word; a flag and its value are two, or one with '='"
        for word in argv
        if word.startswith("--") and re.search(r"\s", word.partition("=")[0])
    ]


def _stray(word: str, argv: Sequence[str]) -> str:
    """Return the error for a word that is neither a flag nor the value of one."""
    flags = _flags()
    room, after = 0.0, ""
    for given in argv:
        if given.startswith("--"):
            flag, equals, _ = given.partition("=")
            name = flag.removeprefix("--")
            kind = flags[name][2] if name in flags else str if name == "config" else bool
            room = 0 if equals or kind is bool else math.inf if kind == list[str] else 1
            takes = "no value: give --name or --no-name alone" if kind is bool else "one value"
            after = f" after {shortened(flag)}, which takes {takes}"
        elif room > 0:
            room -= 1
        elif given == word:
            return f"unexpected argument {show(word)}{after}"
    return f"unexpected argument {show(word)}"


def parse(argv: Sequence[str]) -> TrainConfig:
    """Return the configuration that the command line ``argv`` gives.

    Raises:
        ConfigError: there are unknown flags or keys, or values of a wrong type; one message lists them.
    """
    flags = _flags()
    sglang, argv = split_flags(argv, lambda name: _sglang_prefix(name) != "" and name not in flags)
    if quoted := _quoted_flags(argv):
        raise ConfigError(quoted)
    of_megatron, argv = split_flags(argv, lambda name: not _is_own(name) and find_field(name) is not None)
    namespace, rest = make_parser().parse_known_args(argv)
    errors = [
        _unknown(word.removeprefix("--").split("=")[0], "flag", [*flags, *megatron_fields()]) if word.startswith("--")
        else _stray(word, argv)
        for word in rest
    ]  # fmt: skip
    if rest and rest[0].startswith("--"):  # the words after an unknown flag are its values
        errors = [error for error in errors if not error.startswith("unexpected argument")]
    megatron = _megatron_values(of_megatron, errors)
    values: dict[str, Any] = {}
    if namespace.config is not None:
        values, faults = _values_of_yaml(namespace.config, sglang, megatron)
        errors.extend(faults)
    for name, (_, f, kind) in flags.items():
        if (given := getattr(namespace, f.name)) is None:
            continue
        try:
            values[name] = from_flag(given, kind)
        except ValueError as error:
            errors.append(f"--{name}: {error}")
    errors.extend(sglang_errors(sglang, flags))
    made = _make_sections(values, errors)
    for prefix, target in SGLANG_PREFIXES.items():
        made[target] = {
            name.removeprefix(prefix): words
            for name, words in sglang.items()
            if words is not None and _sglang_prefix(name) == prefix
        }
    if "teacher" in made:
        files = made["teacher"].teacher_config
        made["teachers"] = read_teachers(
            files, made["teacher"], made["teacher_sglang_flags"], errors, lambda passed: sglang_errors(passed, flags)
        )
    if errors:
        raise ConfigError(errors)
    return TrainConfig(**made, megatron_flags=megatron)


def _make_sections(values: Mapping[str, Any], errors: list[str]) -> dict[str, Any]:
    """Return the sections of the configuration with ``values``, by flag name; what a section refuses goes to
    ``errors``."""
    flags, made = _flags(), {}
    parts: dict[str, dict[str, Any]] = {section: {} for section in sections()}
    for name, value in values.items():
        section, f, _ = flags[name]
        parts[section][f.name] = value
    for section, cls in sections().items():
        try:
            made[section] = cls(**parts[section])
        except ValueError as error:
            errors.append(str(error))
    return made


def to_flags(config: TrainConfig) -> dict[str, Any]:
    """Return the whole configuration as YAML keys and values."""
    own = {name: getattr(getattr(config, section), f.name) for name, (section, f, _) in _flags().items()}
    passed = {
        prefix + name: list(words) if len(words) > 1 else words[0] if words else True
        for prefix, target in SGLANG_PREFIXES.items()
        for name, words in getattr(config, target).items()
    }
    return {**own, **config.megatron_flags, **passed}


def changed_flags(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that differ from their defaults."""
    defaults = to_flags(TrainConfig())
    return {name: value for name, value in to_flags(config).items() if value != defaults.get(name)}
