"""What Landlock, which restricts the files that a process may use, is told.  Numbers: ``<linux/landlock.h>``."""

from __future__ import annotations

import struct

READ_FILE, READ_DIR = 1 << 2, 1 << 3
WRITE_FILE, MAKE_DIR, MAKE_REG, TRUNCATE = 1 << 1, 1 << 7, 1 << 8, 1 << 14

READ = READ_FILE | READ_DIR
OWN_DIRECTORY = READ | WRITE_FILE | MAKE_DIR | MAKE_REG | TRUNCATE
"""What a program may do in its directory.  It removes and renames nothing: a file that is removed while it is open or
mapped takes space that nobody sees."""

_RIGHTS_OF_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Version -> how many rights over files it knows; later ones know no more."""
_TCP_ABI, _SCOPE_ABI, _LOG_ABI = 4, 6, 7


def ruleset(abi: int) -> bytes:
    """Return the attributes of a ruleset that refuses everything the version can: files, TCP, signals to others."""
    files = (1 << _RIGHTS_OF_ABI[min(abi, 5)]) - 1
    tcp = 0b11 if abi >= _TCP_ABI else 0
    scope = 0b11 if abi >= _SCOPE_ABI else 0  # abstract Unix sockets, signals
    return struct.pack("<QQQ", files, tcp, scope)


def restrict_flags(abi: int) -> int:
    """Return the flags of landlock_restrict_self: a program cannot flood the machine's audit log with its refusals."""
    return 1 if abi >= _LOG_ABI else 0
