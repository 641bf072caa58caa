"""Names of files inside a directory that somebody else made: they must not lead out of it."""

from __future__ import annotations

from megatron_tropd.json_files import shown

_MAX_BYTES = 255
"""Longest name that file systems have."""


def plain_name_fault(name: object) -> str:
    """Return why ``name`` is not the plain name of a file in a directory; empty if it is."""
    if not isinstance(name, str):
        return f"{shown(name)}, which is not a name"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return f"{shown(name)}, which is not valid text"
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        return f"{shown(name)}, which is not a plain file name"
    return f"{shown(name)}, which is longer than a file name can be" if size > _MAX_BYTES else ""


def inner_path_fault(path: object) -> str:
    """Return why ``path`` is not one of plain names joined by ``/``, inside a directory; empty if it is."""
    if not isinstance(path, str):
        return plain_name_fault(path)
    fault = next((fault for part in path.split("/") if (fault := plain_name_fault(part))), "")
    return f"{shown(path)}, which is not a path inside the directory" if fault else ""
