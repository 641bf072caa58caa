"""Read a configuration from flags and YAML, as the dataclasses of ``config.py`` define them.

The command line overrides YAML, and YAML overrides the defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_tropd.config import TrainConfig
from megatron_tropd.parallel.print_once import Importance, print_once

SGLANG_PREFIX = "sglang-"
"""Prefix of the flags that are passed to SGLang, unless config.py defines them."""
_MISSPELLED = 0.9
"""Similarity from which a name counts as a misspelled flag of ours; SGLang's ep-size and our tp-size have 0.86."""


class ConfigError(ValueError):
    """The configuration, or a file that it names, cannot be used; one message lists all errors."""

    exit_code = 2

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = tuple(dict.fromkeys(errors))  # two models may have the same complaint
        number = len(self.errors)
        count = f"{number} configuration errors" if number != 1 else "1 configuration error"
        super().__init__("\n".join([count + ":", *(f"  - {error}" for error in self.errors)]))


class _CollectingParser(argparse.ArgumentParser):
    """An ArgumentParser that raises ConfigError instead of exiting, and prints its help on one rank of a node."""

    def print_help(self, file: Any = None) -> None:
        print_once(self.format_help().rstrip(), Importance.CAUSE, file or sys.stdout)

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError([message])


def sections() -> dict[str, type]:
    """Return the dataclass of each section, in the order of TrainConfig."""
    hints = typing.get_type_hints(TrainConfig)
    return {f.name: hints[f.name] for f in dataclasses.fields(TrainConfig) if dataclasses.is_dataclass(hints[f.name])}


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


def _choices(kind: Any) -> tuple[str, ...]:
    """Return the values that a Literal, or a union of Literals, allows; () for any other type."""
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)
    if typing.get_origin(kind) is typing.Union:
        return tuple(word for part in typing.get_args(kind) for word in _choices(part))
    return ()


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def make_parser() -> argparse.ArgumentParser:
    """Return the command-line parser of ``megatron_tropd.train``."""
    parser = _CollectingParser(
        prog="torchrun ... -m megatron_tropd.train", allow_abbrev=False,
        description="Trust Region On-Policy Distillation on Megatron-core.",
    )  # fmt: skip
    parser.add_argument("--config", metavar="YAML", help="file whose keys are flag names; flags override it")
    groups = {name: parser.add_argument_group(name, (cls.__doc__ or "").strip()) for name, cls in sections().items()}
    for name, (section, f, kind) in _flags().items():
        text = f"{f.metadata['help']} (default: {_default(f)!r})".replace("%", "%%")
        options: dict[str, Any] = {"dest": f.name, "default": None, "help": text}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif choices := _choices(kind):
            options["metavar"] = "{" + ",".join(choices) + "}"
        elif kind == list[str]:
            options.update(nargs="+", metavar="FILE")
        groups[section].add_argument(f"--{name}", **options)
    return parser


def _coerce(name: str, value: Any, kind: Any) -> Any:
    """Convert a value from YAML or the command line to the type of its field.  YAML reads 5e-6 as a string, so numbers
    are parsed in both cases."""
    if value is None:
        raise ConfigError([f"{name}: has no value; give one or leave the line out"])
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError([f"{name}: {value!r} is not true or false"])
        return value
    if choices := _choices(kind):
        if value not in choices:
            raise ConfigError([f"{name}: {value!r} is not one of {', '.join(choices)}"])
        return value
    if kind == list[str]:
        return [str(v) for v in value] if isinstance(value, list) else [str(value)]
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError):
        raise ConfigError([f"{name}: {value!r} is not a {kind.__name__}"]) from None


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"--config {path}: {error.strerror}"]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"--config {path} is not valid YAML: {error}"]) from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError([f"--config {path} holds a {type(document).__name__}, expected a mapping of flag: value"])
    return {str(key).replace("_", "-"): value for key, value in document.items()}


def _unknown(name: str, where: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.removeprefix("no-"), known, n=1)
    hint = f"; did you mean {'--' if where == 'flag' else ''}{close[0]}?" if close else ""
    return f"unknown {where} {'--' if where == 'flag' else ''}{name}{hint}"


def _split_sglang(argv: Sequence[str], own: Collection[str]) -> tuple[dict[str, tuple[str, ...] | None], list[str]]:
    """Return (flags for SGLang with the words after each, all other words), so that argparse sees only the latter."""
    passed: dict[str, tuple[str, ...] | None] = {}
    others: list[str] = []
    current: str | None = None
    for word in argv:
        name, _, value = word.removeprefix("--").partition("=")
        if word.startswith("--" + SGLANG_PREFIX) and name not in own:
            current = name.removeprefix(SGLANG_PREFIX)
            passed[current] = (value,) if value else ()
        elif word.startswith("--") or current is None:
            current = None
            others.append(word)
        else:
            passed[current] = (*(passed[current] or ()), word)
    return passed, others


def _sglang_errors(names: Collection[str], own: Collection[str]) -> list[str]:
    """Return errors for names that cannot be SGLang flags, and for those that look like a misspelled flag of ours."""
    ours = [name.removeprefix(SGLANG_PREFIX) for name in own if name.startswith(SGLANG_PREFIX)]
    errors = []
    for name in names:
        if not name or "_" in name:
            errors.append(f"--{SGLANG_PREFIX}{name}: expected the name of an SGLang flag, words joined by '-'")
        elif close := difflib.get_close_matches(name, ours, n=1, cutoff=_MISSPELLED):
            errors.append(f"unknown flag --{SGLANG_PREFIX}{name}; did you mean --{SGLANG_PREFIX}{close[0]}?")
    return errors


def _words(value: Any) -> tuple[str, ...] | None:
    """Return the words after a flag, from its YAML value: () for true; None for false or null (no flag)."""
    if value is None or value is False:
        return None
    if value is True:
        return ()
    return tuple(map(str, value)) if isinstance(value, list) else (str(value),)


def parse(argv: Sequence[str]) -> TrainConfig:
    """Return the configuration that the command line ``argv`` gives.

    Raises:
        ConfigError: there are unknown flags or keys, or values of a wrong type; one message lists them.
    """
    flags = _flags()
    sglang, argv = _split_sglang(argv, flags)
    namespace, rest = make_parser().parse_known_args(argv)
    errors = [
        _unknown(word.removeprefix("--").split("=")[0], "flag", list(flags)) if word.startswith("--")
        else f"unexpected argument {word!r}"
        for word in rest
    ]  # fmt: skip
    if rest and rest[0].startswith("--"):  # the words after an unknown flag are its values
        errors = [error for error in errors if not error.startswith("unexpected argument")]
    values: dict[str, dict[str, Any]] = {section: {} for section in sections()}
    for name, value in (_read_yaml(namespace.config) if namespace.config else {}).items():
        if name not in flags and name.startswith(SGLANG_PREFIX):
            sglang.setdefault(name.removeprefix(SGLANG_PREFIX), _words(value))
            continue
        if name not in flags:
            errors.append(_unknown(name, f"key in {namespace.config}:", list(flags)))
            continue
        section, f, kind = flags[name]
        try:
            values[section][f.name] = _coerce(name, value, kind)
        except ConfigError as error:
            errors.extend(f"{namespace.config}: {line}" for line in error.errors)
    for name, (section, f, kind) in flags.items():
        given = getattr(namespace, f.name)
        if given is None:
            continue
        try:
            values[section][f.name] = _coerce(f"--{name}", given, kind)
        except ConfigError as error:
            errors.extend(error.errors)
    errors.extend(_sglang_errors(sglang, flags))
    if errors:
        raise ConfigError(errors)
    parts = {section: cls(**values[section]) for section, cls in sections().items()}
    return TrainConfig(**parts, sglang_flags={name: words for name, words in sglang.items() if words is not None})


def to_flags(config: TrainConfig) -> dict[str, Any]:
    """Return the whole configuration as YAML keys and values."""
    own = {name: getattr(getattr(config, section), f.name) for name, (section, f, _) in _flags().items()}
    passed = {
        SGLANG_PREFIX + name: list(words) if len(words) > 1 else words[0] if words else True
        for name, words in config.sglang_flags.items()
    }
    return {**own, **passed}


def changed_flags(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that differ from their defaults."""
    defaults = to_flags(TrainConfig())
    return {name: value for name, value in to_flags(config).items() if value != defaults.get(name)}
