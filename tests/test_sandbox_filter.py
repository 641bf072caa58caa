"""The seccomp filter of both machines, run by a small interpreter of classic BPF, against the kernel's own tables."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest

from megatron_tropd.sandbox.system_calls import AUDIT_ARCH, SELF, call_numbers, seccomp_filter

ALLOW, KILL = "allow", "kill"
PERM, NOSYS = errno.EPERM, errno.ENOSYS
MACHINES = list(AUDIT_ARCH)


def answer(instructions, arch, number, arguments=()):
    """What the kernel would answer; the instructions are numbered as <linux/bpf_common.h> has them."""
    arguments = [argument & (1 << 64) - 1 for argument in (*arguments, *[0] * 6)][:6]
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments)
    code = [struct.unpack_from("<HBBI", instructions, at) for at in range(0, len(instructions), 8)]
    at = accumulator = 0
    while True:
        operation, if_true, if_false, constant = code[at]
        at += 1
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, constant)
        elif operation == 0x54:
            accumulator &= constant
        elif operation in (0x15, 0x35):
            holds = accumulator == constant if operation == 0x15 else accumulator >= constant
            at += if_true if holds else if_false
        else:
            assert operation == 0x06
            action, value = constant & 0xFFFF0000, constant & 0xFFFF
            return {0x7FFF0000: ALLOW, 0x80000000: KILL}.get(action, value)


def numbers_of_the_kernel(machine):
    """Name -> number, from the headers of the C library's package; empty where they are not installed."""
    if machine == "x86_64":
        files, pattern = (
            ["/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"],
            r"NR_(\w+)\s+(\d+)",
        )
    else:
        files, pattern = ["/usr/include/asm-generic/unistd.h"], r"NR(?:3264)?_(\w+)\s+(\d+)"
    text = "".join(Path(file).read_text() for file in files if Path(file).exists())
    return {name.replace("fstatat", "newfstatat", name == "fstatat"): int(n) for name, n in re.findall(pattern, text)}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_numbers_are_the_kernels(machine):
    kernels = numbers_of_the_kernel(machine)
    if not kernels:
        pytest.skip("no headers of Linux here")
    ours = call_numbers(machine)
    assert ours == {name: kernels.get(name) for name in ours}
    forbidden = {
        "execve", "execveat", "clone3", "socket", "connect", "bind", "ptrace", "process_vm_readv", "process_vm_writev",
        "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal", "fchmodat", "fchownat", "utimensat",
        "setxattr", "truncate", "unlinkat", "renameat2", "linkat", "symlinkat", "mknodat", "mount", "unshare", "setns",
        "memfd_create", "io_uring_setup", "bpf", "perf_event_open", "userfaultfd", "keyctl", "open_by_handle_at", "sendmsg",
        "setpriority", "sched_setaffinity", "shmget", "mq_open", "splice", "chroot", "setuid", "capset", "seccomp",
    }  # fmt: skip
    assert forbidden <= kernels.keys() and not forbidden & ours.keys()
    for name, number in kernels.items():
        said = answer(seccomp_filter(machine), AUDIT_ARCH[machine], number)
        assert name in ours or said == (PERM if number < 424 else NOSYS), name


@pytest.mark.parametrize("machine", MACHINES)
def test_other_architectures_and_calls_that_are_unknown(machine):
    filter_, arch = seccomp_filter(machine), AUDIT_ARCH[machine]
    assert len(filter_) // 8 < 4096  # what the kernel takes
    assert answer(filter_, 0x40000003, call_numbers(machine)["read"]) == KILL  # 32-bit x86
    assert answer(filter_, AUDIT_ARCH[next(name for name in MACHINES if name != machine)], 63) == KILL
    assert answer(filter_, arch, 5000) == NOSYS
    x32 = answer(filter_, arch, 0x40000000)
    assert x32 == (KILL if machine == "x86_64" else NOSYS)


O_TRUNC, O_TMPFILE = 0o1000, 0o20000000
OPENINGS = [
    (0, ALLOW),
    (0o101, ALLOW),
    (0o1101, ALLOW),
    (0o2002, ALLOW),
    (O_TRUNC, PERM),
    (3, PERM),
    (O_TMPFILE | 2, PERM),
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("call", "arguments", "said"),
    [
        ("read", (0,), ALLOW),
        ("clone", (0x3D0F00,), ALLOW),  # a thread of glibc
        ("clone", (0x7D0F00,), ALLOW),  # a thread of musl
        ("clone", (0x01200011,), PERM),  # fork
        ("clone", (0x4111,), PERM),  # vfork
        *[("clone", (0x3D0F00 | 1 << bit,), PERM) for bit in (7, 13, 15, 17, 25, 26, 27, 28, 29, 30)],
        ("kill", (SELF, 9), ALLOW),
        ("kill", (SELF - 1, 9), PERM),
        ("kill", (0, 9), PERM),
        ("kill", (-1, 9), PERM),
        ("kill", (-SELF, 9), PERM),
        ("tgkill", (SELF, 5, 9), ALLOW),
        ("tgkill", (5, SELF, 9), PERM),
        ("prlimit64", (0,), ALLOW),
        ("prlimit64", (1,), PERM),
        ("prctl", (15,), ALLOW),
        ("prctl", (1,), PERM),
        ("prctl", (4,), PERM),
        ("fcntl", (1, 4), ALLOW),
        ("fcntl", (1, 8), PERM),  # F_SETOWN
        ("fcntl", (1, 10), PERM),  # F_SETSIG
        ("fcntl", (1, 15), PERM),  # F_SETOWN_EX
        ("fcntl", (1, 1030), ALLOW),
        ("fcntl", (1, 1031), PERM),  # F_SETPIPE_SZ
        ("ioctl", (1, 0x5401), ALLOW),
        ("ioctl", (1, 0x5412), PERM),  # TIOCSTI
        ("ioctl", (1, 0x8901), PERM),  # FIOSETOWN
        ("socketpair", (1, 0o2000001), ALLOW),
        ("socketpair", (1, 2), PERM),
        ("socketpair", (2, 1), PERM),
        *[("openat", (-100, 0, flags), said) for flags, said in OPENINGS],
    ],
)
def test_arguments(machine, call, arguments, said):
    number = call_numbers(machine)[call]
    high = [
        argument | 0xABCD << 32 if index != 0 or call != "read" else argument
        for index, argument in enumerate(arguments)
    ]
    for values in (arguments, high):  # the kernel looks at the lower 32 bits of these
        assert answer(seccomp_filter(machine), AUDIT_ARCH[machine], number, values) == said


@pytest.mark.parametrize(("flags", "said"), OPENINGS)
def test_open_of_x86_64(flags, said):
    number = call_numbers("x86_64")["open"]
    assert answer(seccomp_filter("x86_64"), AUDIT_ARCH["x86_64"], number, (0, flags)) == said
