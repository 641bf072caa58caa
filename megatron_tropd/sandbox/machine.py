"""What the kernel of this machine can enforce."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import sys
from dataclasses import dataclass

from megatron_tropd.sandbox import system_calls

_LANDLOCK_CREATE_RULESET = 444  # on all architectures
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_GET_ACTION_AVAIL, _ACTION_ERRNO = 2, 0x00050000


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is to confine a program with."""

    landlock_abi: int
    """Version of Landlock; 0: none."""
    calls: bytes
    """The seccomp filter; empty: none."""
    linux: bool = True
    missing: tuple[str, ...] = ()
    """What cannot be enforced, a sentence each, with what to do about it."""


def _landlock_abi(libc: ctypes.CDLL) -> tuple[int, str]:
    """Return the version of Landlock, or 0 and why there is none."""
    version = libc.syscall(ctypes.c_long(_LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0), 1)
    if version > 0:
        return version, ""
    reasons = {
        errno.ENOSYS: "the kernel is older than 5.13, was built without it, or a container's seccomp profile hides it",
        errno.EOPNOTSUPP: "it is switched off; add landlock to the kernel's boot parameter lsm=",
        errno.EPERM: "a container's seccomp profile refuses it",
    }
    number = ctypes.get_errno()
    return 0, reasons.get(number, os.strerror(number))


def _has_filters(libc: ctypes.CDLL, name: str) -> bool:
    action = ctypes.c_uint32(_ACTION_ERRNO)
    return libc.syscall(ctypes.c_long(_SECCOMP[name]), _GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0


@functools.cache
def this_machine() -> Machine:
    """Return what this machine has.  Nothing is changed by looking."""
    name = platform.machine()
    if sys.platform != "linux" or name not in system_calls.AUDIT_ARCH:
        known = ", ".join(system_calls.AUDIT_ARCH)
        text = f"Nothing can be enforced on {sys.platform} {name}; the sandbox knows Linux on {known}."
        return Machine(landlock_abi=0, calls=b"", linux=sys.platform == "linux", missing=(text,))
    libc = ctypes.CDLL(None, use_errno=True)
    missing = []
    abi, reason = _landlock_abi(libc)
    if not abi:
        missing.append(f"Files cannot be restricted, because there is no Landlock: {reason}.")
    filters = _has_filters(libc, name)
    if not filters:
        missing.append(
            "Network, processes and signals cannot be restricted, because there is no seccomp filter: the kernel was "
            "built without CONFIG_SECCOMP_FILTER, or a container's runtime hides it."
        )
    if not os.path.isdir("/proc/self/task"):
        missing.append("The number of threads cannot be restricted, because /proc is not mounted.")
    return Machine(
        landlock_abi=abi, calls=system_calls.seccomp_filter(name) if filters else b"", missing=tuple(missing)
    )
