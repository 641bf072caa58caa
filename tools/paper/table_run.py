"""Train and evaluate the rows of a table, one after the other, and go on where an earlier call was ended.

    OUT/TABLE/SETTING/ROW/row.json             what the row is
    OUT/TABLE/SETTING/ROW/seed-N/recipe.yaml   its flags
                                 run/          the run directory
                                 benchmark/    --output of python -m megatron_tropd.benchmark

A row that another table of OUT has too, trained and evaluated, is not made again: ``seed-N`` is then a link to it.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_tropd.cli import parse
from megatron_tropd.config import TrainConfig
from megatron_tropd.json_files import read_json_object
from megatron_tropd.reporting.records import of_kind, read_records
from megatron_tropd.reporting.run_directory import is_exported
from tools.paper.recipes import ROOT, Place, Row, Tables, recipe
from tools.paper.resolved import configuration, methods_of

_METHOD_SECTIONS = ("objective", "method", "rollout", "training", "reward")
"""Sections of a configuration that decide what a row means."""
_MODELS_AND_DATA = {
    "model": ("hf_checkpoint", "pretrained_checkpoint"),
    "teacher": ("teacher_hf_checkpoint", "teacher_load"),
    "data": ("prompt_data", "max_prompt_length", "max_response_length", "apply_chat_template", "on_long_response"),
}
"""Settings of other sections that do; the rest says where and how the work is done."""
_OF_THE_MACHINE = ("max_tokens_per_microbatch", "logits_chunk_tokens", "head_mode", "rollout_max_batch_size")
"""Settings in these sections that fit a run into memory."""
VARIABLES = {"PROMPTS": "prompt-data", "STUDENT": "hf-checkpoint", "TEACHER": "teacher-hf-checkpoint"}
"""Environment variables of examples/paper/common.sh that decide what a row means -> their flags."""
EXIT_FAILED, EXIT_USAGE = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How the rows of a table are made."""

    out: Path
    seeds: tuple[int, ...]
    launch: tuple[str, ...]
    """Command that trains a row; --setting, --row, --out and the trainer's flags follow."""
    small_world: Path | None
    """Of a smoke run; None for a real one."""
    benchmark: tuple[str, ...] | None
    """Flags of the benchmark command that all rows share; None for no benchmarks."""
    trainer_flags: tuple[str, ...]
    """What follows ``--`` on the command line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a row with a seed."""

    place: Place
    seed: int
    done: bool
    what: str
    seconds: float = 0.0


class RowFailure(RuntimeError):
    """A row could not be made; the next one is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRun:
    """A table that is made with the same options for each row."""

    tables: Tables
    options: Options

    def run(self, places: Sequence[Place]) -> Iterator[Outcome]:
        """Make every row and seed; yields each outcome when it is known.  A row that fails does not end the others."""
        wanted = {place: self.wanted(place) for place in places if not place.row.evaluates}
        for place in places:
            for seed in self.options.seeds[: 1 if place.row.evaluates else None]:  # a model as it is has no seeds
                started = time.monotonic()
                try:
                    what, done = self._make(place, seed, wanted.get(place)), True
                except (RowFailure, OSError, ValueError) as failure:  # a full disk, a damaged file, no such command
                    what, done = str(failure), False
                seconds = time.monotonic() - started
                yield Outcome(place=place, seed=seed, done=done, what=what, seconds=seconds)

    def wanted(self, place: Place) -> TrainConfig:
        """Return the configuration that ``place`` asks for.

        Raises:
            ConfigError: the trainer would refuse its flags.
        """
        options = self.options
        given = {} if options.small_world else os.environ  # as in common.sh
        return configuration(
            self.tables, place.setting.name, place.row.name, options.small_world, *options.trainer_flags,
            more={flag: given[name] for name, flag in VARIABLES.items() if given.get(name)},
        )  # fmt: skip

    def _make(self, place: Place, seed: int, wanted: TrainConfig | None) -> str:
        row_dir = self.options.out / place.table / place.setting.name / place.row.name
        directory = row_dir / f"seed-{seed}"
        if wanted is None and self.options.benchmark is None:
            return "nothing to train"
        _write_row(row_dir / "row.json", place)
        if directory.is_symlink() and not directory.exists():  # what it led to is gone
            directory.unlink()
        if not directory.exists() and (twin := self._twin(place, seed, wanted)) is not None:
            directory.symlink_to(os.path.relpath(twin, row_dir), target_is_directory=True)
            found = [f"the same as {twin}"]
        else:
            found = [] if wanted is None else [self._train(place, seed, directory, wanted)]
        if self.options.benchmark is not None:
            found.append(self._evaluate(place, directory))
        return ", ".join(found)

    def _twin(self, place: Place, seed: int, wanted: TrainConfig | None) -> Path | None:
        """The directory of the same row and seed in another table, where it is complete."""
        for other in self.options.out.glob(f"*/{place.setting.name}/{place.row.name}/seed-{seed}"):
            whole = other.parents[2].name != place.table and not other.is_symlink()
            if whole and wanted is not None:
                whole = _is_whole(other / "run", wanted) and not _differences(other / "run", wanted)
            if whole and self.options.benchmark is not None:
                whole = _is_evaluated(other / "benchmark", place.setting.benchmarks)
            if whole:
                return other
        return None

    def _train(self, place: Place, seed: int, directory: Path, wanted: TrainConfig) -> str:
        run_dir, options = directory / "run", self.options
        if changed := _differences(run_dir, wanted):
            raise RowFailure(f"{run_dir} was made with other flags ({'; '.join(changed)}): move it, or change --out")
        if _is_whole(run_dir, wanted):
            return "was trained"
        words = [*options.launch, "--setting", place.setting.name, "--row", place.row.name, "--out", str(directory)]
        words += ["--smoke"] if options.small_world else []
        code = call([*words, *options.trainer_flags, "--seed", str(seed)], self._environment())
        if code:
            raise RowFailure(f"training ended with exit code {code}")
        if not _is_whole(run_dir, wanted):
            raise RowFailure(f"training ended with exit code 0, but {run_dir} is not complete: does --launch wait?")
        return "trained"

    def _evaluate(self, place: Place, directory: Path) -> str:
        # Also where all scores are there: whether they are of this model and these settings, only the command knows.
        code = call(self.benchmark_words(place, directory), self._environment())
        if code:
            raise RowFailure(f"the benchmarks ended with exit code {code}")
        return "evaluated"

    def benchmark_words(self, place: Place, directory: Path) -> list[str]:
        """Return the command that evaluates a row."""
        model = ["--run-dir", str(directory / "run")]
        if place.row.evaluates:
            given = os.environ.get(place.row.evaluates.upper())  # STUDENT, TEACHER, as for train.sh
            model = ["--hf-checkpoint", given or self._model_of(place.setting.name, place.row)]
        return [
            sys.executable, "-m", "megatron_tropd.benchmark", *model, "--model-name", place.title,
            "--benchmarks", *place.setting.benchmarks, "--paper-setting", place.setting.paper_setting,
            "--output", str(directory / "benchmark"), *(self.options.benchmark or ()),
        ]  # fmt: skip

    def _model_of(self, setting: str, row: Row) -> str:
        flags = recipe(self.tables, setting, methods_of(self.tables, setting)[0], self.options.small_world)
        value = flags["hf-checkpoint" if row.evaluates == "student" else "teacher-hf-checkpoint"]
        assert not isinstance(value, tuple)  # a flag with one word
        return value.text

    def _environment(self) -> dict[str, str]:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        world = {"SMALL_WORLD": str(self.options.small_world)} if self.options.small_world else {}
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **world}


def call(words: Sequence[str], environment: dict[str, str]) -> int:
    """Run a command to its end and return its exit code; an interruption of this process ends it too, by SIGTERM."""
    print(f"$ {shlex.join(words)}", flush=True)
    with subprocess.Popen(words, env=environment) as child:
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.terminate()
            child.wait()
            raise


def _write_row(path: Path, place: Place) -> None:
    content: dict[str, Any] = {
        "table": place.table, "setting": place.setting.name, "row": place.row.name, "title": place.title,
        "method_flags": dict(place.row.flags),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    whole.replace(path)


def _is_whole(run_dir: Path, wanted: TrainConfig) -> bool:
    """Whether all steps were made and the student was exported."""
    steps = of_kind(read_records(run_dir / "metrics.jsonl"), "step")
    return is_exported(run_dir) and bool(steps) and steps[-1]["step"] == wanted.training.train_iters


def _is_evaluated(output: Path, benchmarks: Sequence[str]) -> bool:
    """Whether all scores are there, of whatever model."""
    summary = output / "summary.json"
    return summary.is_file() and set(benchmarks) <= set(read_json_object(summary))


def _differences(run_dir: Path, wanted: TrainConfig) -> list[str]:
    """Flags of method, optimizer, models and data that a run was made with and that are not those wanted.

    [] for no run.  Prompts that are not said, because they are not needed to evaluate, are not compared.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        return []
    made = parse(["--config", str(file)])
    return [
        f"--{name.replace('_', '-')} {was}, now {now}"
        for section, name in _settings_of_a_row()
        if _place(was := getattr(getattr(made, section), name))
        != _place(now := getattr(getattr(wanted, section), name))
        and (name, now) != ("prompt_data", [])
    ]


def _settings_of_a_row() -> Iterator[tuple[str, str]]:
    """Section and name of each setting that must be the same."""
    for section in _METHOD_SECTIONS:
        for field in fields(getattr(TrainConfig(), section)):
            if field.name not in (*_OF_THE_MACHINE, "seed"):  # the directory's name has the seed
                yield section, field.name
    for section, names in _MODELS_AND_DATA.items():
        yield from ((section, name) for name in names)


def _place(value: object) -> object:
    """A setting's value such that two names of one file or directory are the same."""
    if isinstance(value, list):
        return [_place(one) for one in value]
    return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value
