"""The directory that a program may write in: how much is in it, and its end, whatever the program did to it."""

from __future__ import annotations

import os
import stat

_DEEPEST = 32
"""Directories inside each other; looking at thousands would take the watch seconds."""


def excess(directory: str, *, file_bytes: int, files: int) -> str:
    """Return which limit the files in ``directory`` break, or an empty text."""
    waiting = [(directory, 0)]
    size = count = 0
    while waiting:
        place, depth = waiting.pop()
        if depth > _DEEPEST:
            return f"more than {_DEEPEST} directories inside each other"
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    count += 1
                    about = entry.stat(follow_symlinks=False)
                    size += max(about.st_size, 512 * about.st_blocks) if stat.S_ISREG(about.st_mode) else 0
                    if stat.S_ISDIR(about.st_mode):
                        waiting.append((entry.path, depth + 1))
                    if count > files:
                        return f"more than {files} files"
        except OSError as error:
            return f"files that cannot be looked at: {error.strerror}"
        if size > file_bytes:
            return f"more than {file_bytes} bytes in files"
    return ""


def remove(directory: str) -> None:
    """Remove ``directory``, also what in it is nested too deeply for a path, or cannot be read.

    Each directory inside is moved up first, so that paths stay short.  The entries of ``directory`` itself are the
    caller's: none has a number for a name, as moved directories have.
    """
    waiting, moved = [directory], 0
    while waiting:
        place = waiting.pop()
        with os.scandir(place) as entries:
            found = [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for path, is_directory in found:
            if not is_directory:
                os.unlink(path)
                continue
            os.chmod(path, 0o700)
            waiting.append(os.path.join(directory, str(moved)))
            os.rename(path, waiting[-1])
            moved += 1
        if place != directory:
            os.rmdir(place)
    os.rmdir(directory)
