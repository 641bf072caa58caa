"""The data files that an entry of --prompt-data stands for.

An entry is a file, a directory or a name on the Hugging Face hub, followed by ``::SPLIT`` or ``::CONFIG/SPLIT`` where a
directory or data set holds several splits.  Which files of a directory belong to which split is decided by the
``datasets`` library (the card's configurations, then the names of files and folders), so that a directory means here
what it means there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_tropd.flag_values import shortened
from megatron_tropd.hub import is_hub_name, resolve
from megatron_tropd.json_files import read_json_object, shown
from megatron_tropd.plain_names import plain_name_fault

Kind = Literal["jsonl", "json", "parquet", "saved"]
"""How the rows are read; "saved" is a directory written by ``datasets.Dataset.save_to_disk``."""

_KINDS: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
_SAVED = "what datasets writes with save_to_disk"
_COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_READABLE = "a .jsonl, .json or .parquet file (JSON also as .gz, .zst, .bz2 or .xz), a directory of such, or a data set"
_NOT_DATA = {
    "dataset_infos.json", "dataset_info.json", "state.json", "dataset_dict.json",
    "report.json", "dropped.jsonl",  # what tools/prepare_prompts.py writes beside the rows
}  # fmt: skip
HUB_FILES = ("*.jsonl*", "*.json*", "*.parquet", "*.ndjson*", "README.md", "*.yaml")
"""What is fetched of a data set on the hub."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """One file of rows, or one saved data set."""

    path: str
    kind: Kind
    compression: str = ""
    """Last suffix of a compressed file; "" for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What one entry of --prompt-data stands for."""

    given: str
    files: tuple[DataFile, ...]
    revision: str = ""
    """Commit of a data set from the hub."""


class SourceError(ValueError):
    """An entry of --prompt-data cannot be read; ``found`` and ``expected`` are the parts of the message."""

    def __init__(self, path: str, found: str, expected: str = _READABLE) -> None:
        super().__init__(f"{path}: {found}; expected {expected}")
        self.path, self.found, self.expected = path, found, expected


def find_source(given: str, flag: str = "--prompt-data") -> Source:
    """Return the data files of one entry of --prompt-data, in the order in which they are read.

    ``flag`` is the flag that gave the entry, for messages.

    Raises:
        SourceError: there is no such file or data set, its format is unknown, or a split must be named.
    """
    try:
        return _find(given, flag)
    except OSError as error:  # a name that is too long, a directory that may not be listed
        raise SourceError(shortened(given, 400), f"cannot be read ({error.strerror})") from error


def _find(given: str, flag: str) -> Source:
    name, _, part = (given, "", "") if Path(given).exists() else given.partition("::")
    path, revision = Path(name), ""
    if _file_kind(path) is None and is_hub_name(name):
        try:
            resolved = resolve(name, repo_type="dataset", allow_patterns=HUB_FILES, flag=flag)
        except ValueError as error:
            raise SourceError(name, f"not found ({error})") from error
        path, revision = resolved.path, resolved.commit
    if path.is_dir():
        return Source(given=given, files=_of_directory(path, part), revision=revision)
    if part:
        raise SourceError(given, "a split of something that is not a directory", "FILE without ::SPLIT")
    return Source(given=given, files=(_of_file(path),))


def _file_kind(path: Path) -> DataFile | None:
    """Return how a file is read, by its suffixes; None for a suffix that is not one of data."""
    suffix, rest = path.suffix.lower(), path
    compression = suffix if suffix in _COMPRESSIONS else ""
    if compression:
        rest = path.with_suffix("")
    kind = _KINDS.get(rest.suffix.lower())
    if kind is None or (compression and kind == "parquet"):
        return None
    return DataFile(path=str(path), kind=kind, compression=compression)


def _of_file(path: Path) -> DataFile:
    file = _file_kind(path)
    if file is None:
        found = f"unknown suffix {path.suffix!a}" if path.exists() or path.suffix else "no such file or data set"
        raise SourceError(str(path), found)
    if not path.is_file():
        raise SourceError(str(path), "no such file")
    return file


def _of_directory(path: Path, part: str) -> tuple[DataFile, ...]:
    if (path / "dataset_dict.json").is_file():
        return (_saved_split(path, part),)
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        if part:
            raise SourceError(f"{path}::{part}", "a saved data set without splits", "the directory without ::SPLIT")
        return (_saved(path),)
    config, _, split = part.rpartition("/")
    splits = _splits(path, config)
    chosen = _choose(path, list(splits), split)
    used = {name for files in splits.values() for name in files}
    if not config and (left := [file for file in _data_files(path) if str(file) not in used]):
        raise SourceError(
            str(path),
            f"files of which the data set makes no use, such as {left[0].relative_to(path)}",
            "files of one format that all belong to a split; move them, or name the files one by one",
        )
    return tuple(_of_file(Path(name)) for name in sorted(splits[chosen]))


def _saved_split(path: Path, part: str) -> DataFile:
    description = path / "dataset_dict.json"
    try:
        names = read_json_object(description, strict=True).get("splits")
        if not isinstance(names, list) or not names:
            raise ValueError(f"splits is {shown(names)}")
        _check_names(names)
    except ValueError as error:
        raise SourceError(str(description), f"unreadable ({error})", _SAVED) from error
    return _saved(path / _choose(path, names, part))


def _saved(path: Path) -> DataFile:
    """Return a saved data set, whose files are all in its directory."""
    state = path / "state.json"
    try:
        files = read_json_object(state, strict=True).get("_data_files")
        if not isinstance(files, list):
            raise ValueError(f"_data_files is {shown(files)}")
        _check_names([file.get("filename") if isinstance(file, dict) else file for file in files])
    except (OSError, ValueError) as error:
        raise SourceError(str(state), f"unreadable ({error})", _SAVED) from error
    return DataFile(path=str(path), kind="saved")


def _check_names(names: Sequence[object]) -> None:
    if fault := next((fault for name in names if (fault := plain_name_fault(name))), ""):
        raise ValueError(f"it names {fault}")


def _choose(path: Path, names: Sequence[str], split: str) -> str:
    """Return the split to read; one that is not named must be the only one."""
    if split in names:
        return split
    if not split and len(names) == 1:
        return names[0]
    found = f"no split {split!r} among {', '.join(names)}" if split else f"several splits: {', '.join(names)}"
    raise SourceError(str(path), found, f"one of them by its name, such as {path}::{names[0] if names else 'train'}")


def _splits(path: Path, config: str) -> Mapping[str, Sequence[str]]:
    """Return the files of each split of a directory, as the ``datasets`` library sees it."""
    import datasets

    datasets.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:  # the library writes lock files
        try:
            builder = datasets.load_dataset_builder(str(path), config or None, cache_dir=scratch)
        except Exception as error:  # its errors have no common type
            reason = " ".join((str(error) or type(error).__name__).split())[:300]
            expected = f"{_READABLE}; {path}::CONFIG/SPLIT where there are several configurations"
            raise SourceError(str(path), f"a directory without readable data ({reason})", expected) from error
    files = builder.config.data_files or {}
    return {str(split): [str(name) for name in names] for split, names in files.items()}


def _data_files(path: Path) -> list[Path]:
    """Return the files under a directory that look like data; hidden ones and descriptions are left out."""
    return [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and _file_kind(file) is not None
        and file.name not in _NOT_DATA
        and not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
    ]
