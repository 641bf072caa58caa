"""Read the files of --teacher-config: each describes one of several teachers.

A file is YAML.  Its keys are the flags of a teacher, as in ``teacher-hf-checkpoint``, and ``domains`` and ``weight``;
what it leaves out is as the run's own --teacher flags say.  The name of the file is the name of the teacher.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tropd.flag_values import check_text, from_yaml, shortened, words_of_yaml
from megatron_tropd.plain_yaml import PlainYamlError, Value, read_plain_yaml
from megatron_tropd.teacher_config import NamedTeacher, TeacherConfig

OF_THE_FILE = ("domains", "weight")
"""Keys that are no flags."""
_OF_THE_RUN = ("teacher-config", "teacher-topk-margin")
"""Flags of the group that are the same for all teachers."""
_SGLANG = "teacher-sglang-"
_NAME = re.compile(r"[a-z0-9]+([-_][a-z0-9]+)*")

Words = Mapping[str, tuple[str, ...]]


def read_teachers(
    paths: Sequence[str], given: TeacherConfig, sglang_flags: Words, errors: list[str],
    check_sglang: Callable[[Words], list[str]],
) -> tuple[NamedTeacher, ...]:  # fmt: skip
    """Return the teachers that the files at ``paths`` describe; what is wrong with them goes to ``errors``.

    ``given`` and ``sglang_flags`` are the run's own: the defaults of every file.  ``check_sglang`` says what is wrong
    with flags for SGLang, by their whole names.
    """
    teachers: dict[str, NamedTeacher] = {}
    for path in paths:
        where, name = f"--teacher-config {shortened(path)}", Path(path).stem
        if not _NAME.fullmatch(name):
            errors.append(
                f"{where}: the file's name is the teacher's, in metrics and directories: expected small letters, "
                "digits, - and _ before .yaml"
            )
        elif name in teachers:
            errors.append(f"{where}: {shortened(teachers[name].file)} has the same name; rename one, teachers go by it")
        else:
            teachers[name] = _read(path, name, given, sglang_flags, errors)
            passed = {_SGLANG + flag: words for flag, words in teachers[name].sglang_flags.items()}
            errors.extend(f"{where}: {error}" for error in check_sglang(passed))
    return tuple(teachers.values())


def _read(path: str, name: str, given: TeacherConfig, sglang_flags: Words, errors: list[str]) -> NamedTeacher:
    where, passed = f"--teacher-config {shortened(path)}", dict(sglang_flags)
    values: dict[str, Any] = {"domains": [], "weight": 1.0}
    kinds = {"domains": list[str], "weight": float, **_flags()}
    for key, value in _settings(path, where, errors).items():
        try:
            if key.startswith(_SGLANG) and key not in kinds:
                _pass(passed, key.removeprefix(_SGLANG), value)
            elif key in kinds:
                values[key] = from_yaml(value, kinds[key], getattr(given, key.replace("-", "_"), None))
            elif key in _OF_THE_RUN:
                errors.append(f"{where}: {key} is the same for all teachers: give it as a flag of the run")
            else:
                errors.append(f"{where}: unknown key {shortened(key)}; expected domains, weight or a flag of a teacher")
        except ValueError as error:
            errors.append(f"{where}: {key}: {error}")
    domains, weight = tuple(dict.fromkeys(values.pop("domains"))), values.pop("weight")
    if not weight > 0:
        errors.append(f"{where}: weight {weight:g} must be positive; leave the file out for a teacher without a share")
    settings = dataclasses.replace(given, **{key.replace("-", "_"): value for key, value in values.items()})
    return NamedTeacher(
        name=name, file=path, domains=domains, weight=weight, settings=settings, sglang_flags=passed
    )  # fmt: skip


def _flags() -> dict[str, Any]:
    """Type of every flag that a file may set."""
    kinds = {name.replace("_", "-"): kind for name, kind in typing.get_type_hints(TeacherConfig).items()}
    return {name: kind for name, kind in kinds.items() if name not in _OF_THE_RUN}


def _pass(passed: dict[str, tuple[str, ...]], name: str, value: Value) -> None:
    words = words_of_yaml(value)
    if words is None:
        passed.pop(name, None)
    else:
        passed[name] = words


def _settings(path: str, where: str, errors: list[str]) -> Mapping[str, Value]:
    try:
        return read_plain_yaml(check_text(path))
    except OSError as error:
        errors.append(f"{where}: {error.strerror}")
    except PlainYamlError as error:
        errors.extend(f"{where}: {line}" for line in error.errors)
    except ValueError as error:  # no path at all
        errors.append(f"--teacher-config: {error}")
    return {}


def _settings_of(one: NamedTeacher) -> dict[str, Any]:
    values = {"domains": list(one.domains), "weight": one.weight}
    values |= {name: getattr(one.settings, name.replace("-", "_")) for name in _flags()}
    return values | {_SGLANG + name: list(words) for name, words in one.sglang_flags.items()}


def settings_of_teachers(teachers: Sequence[NamedTeacher]) -> dict[str, Any]:
    """Return what the files say, as settings that can be compared: ``teacher-config NAME KEY`` -> value."""
    return {f"teacher-config {one.name} {key}": value for one in teachers for key, value in _settings_of(one).items()}


def file_of_teacher(teacher: NamedTeacher) -> dict[str, Any]:
    """Return the content of a file that describes the teacher, whatever the run's own flags say; models of the Hub are
    named with their commits once the run has looked them up."""
    return {name: value for name, value in _settings_of(teacher).items() if value not in ("", [])}
