"""The files that are read, and what the report records of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.data.reading.sources import DataFile, SourceError, find_source
from tools.prompt_preparation.settings import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFile:
    """One data file."""

    file: DataFile
    name: str
    """The entry of the command line, and the path below it where it is a directory or a data set of the Hub."""
    num_bytes: int
    revision: str
    """Commit of a data set of the Hub; "" for local files."""

    def recorded(self) -> dict[str, object]:
        """Return what the report says of the file: nothing of where this machine keeps it."""
        record: dict[str, object] = {"file": self.name, "bytes": self.num_bytes}
        return {**record, "commit": self.revision} if self.revision else record


def find_files(given: str, flag: str) -> list[FoundFile]:
    """Return the data files of one entry of the command line, in the order in which they are read.

    Raises:
        UsageError: there is no such file or data set, or it cannot be read.
    """
    try:
        source = find_source(given, flag)
        paths = [Path(file.path) for file in source.files]
        names = _names(given, paths, source.revision)
        return [
            FoundFile(file=file, name=name, num_bytes=_size(path), revision=source.revision)
            for file, path, name in zip(source.files, paths, names, strict=True)
        ]
    except SourceError as error:
        raise UsageError(f"{flag} {given}: {error.found}; expected {error.expected}") from error
    except OSError as error:
        raise UsageError(f"{flag} {given}: cannot be read ({error.strerror})") from error


def _names(given: str, paths: list[Path], revision: str) -> list[str]:
    """Return the names of the files of one entry: where it is one file, the entry itself."""
    if [str(path) for path in paths] == [given]:
        return [given]
    base = Path(given.partition("::")[0])
    if revision:  # the snapshot of a commit has its name
        base = next(parent for parent in paths[0].parents if parent.name == revision)
    return [f"{given}/{path.relative_to(base)}" if path != base else given for path in paths]


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files of a saved data set."""
    if path.is_dir():
        return sum(file.stat().st_size for file in sorted(path.rglob("*")) if file.is_file())
    return path.stat().st_size
