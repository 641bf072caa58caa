"""The system calls that a confined program may make, as a program of the kernel's seccomp filter.

The filter lists what is allowed, so a call that a later kernel brings is refused.  No listed call starts a process or
another program, opens a connection, sends a signal to another process, or changes the mode, the owner or the times of a
file, which Landlock does not restrict.

Numbers: ``asm/unistd_64.h`` (x86_64) and ``asm-generic/unistd.h`` (aarch64) of Linux.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Machine -> what the kernel calls it in the data of a filter."""
SELF = 0x7FFFFFF1
"""Stands for the id of the process in a filter, which is known only in the process.  No id is that large."""

_X32_BIT = 0x40000000
_FIRST_OPTIONAL = 424
"""From this number on, the numbers of all architectures are equal, and the calls so young that libraries do without
them where the kernel says ENOSYS, such as clone3 and openat2.  EPERM would be an error for them."""

_CALLS = """
read 0 63
write 1 64
open 2 -
openat 257 56
close 3 57
close_range 436 436
lseek 8 62
pread64 17 67
pwrite64 18 68
readv 19 65
writev 20 66
preadv 295 69
pwritev 296 70
preadv2 327 286
pwritev2 328 287
sendfile 40 71
copy_file_range 326 285
ftruncate 77 46
fallocate 285 47
fsync 74 82
fdatasync 75 83
fadvise64 221 223
dup 32 23
dup2 33 -
dup3 292 24
pipe 22 -
pipe2 293 59
fcntl 72 25
ioctl 16 29
umask 95 166
stat 4 -
lstat 6 -
fstat 5 80
newfstatat 262 79
statx 332 291
access 21 -
faccessat 269 48
faccessat2 439 439
readlink 89 -
readlinkat 267 78
getdents64 217 61
getcwd 79 17
chdir 80 49
fchdir 81 50
mkdir 83 -
mkdirat 258 34
creat 85 -
poll 7 -
ppoll 271 73
select 23 -
pselect6 270 72
epoll_create 213 -
epoll_create1 291 20
epoll_ctl 233 21
epoll_wait 232 -
epoll_pwait 281 22
epoll_pwait2 441 441
eventfd 284 -
eventfd2 290 19
timerfd_create 283 85
timerfd_settime 286 86
timerfd_gettime 287 87
signalfd4 289 74
socketpair 53 199
sendto 44 206
recvfrom 45 207
shutdown 48 210
mmap 9 222
munmap 11 215
mremap 25 216
mprotect 10 226
madvise 28 233
msync 26 227
brk 12 214
membarrier 324 283
exit 60 93
exit_group 231 94
clone 56 220
futex 202 98
set_tid_address 218 96
set_robust_list 273 99
rseq 334 293
sched_yield 24 124
wait4 61 260
waitid 247 95
restart_syscall 219 128
rt_sigaction 13 134
rt_sigprocmask 14 135
rt_sigreturn 15 139
rt_sigpending 127 136
rt_sigsuspend 130 133
rt_sigtimedwait 128 137
sigaltstack 131 132
pause 34 -
kill 62 129
tgkill 234 131
alarm 37 -
setitimer 38 103
getitimer 36 102
timer_create 222 107
timer_settime 223 110
timer_gettime 224 108
timer_getoverrun 225 109
timer_delete 226 111
nanosleep 35 101
clock_nanosleep 230 115
clock_gettime 228 113
clock_getres 229 114
gettimeofday 96 169
time 201 -
times 100 153
getrusage 98 165
sysinfo 99 179
uname 63 160
getrandom 318 278
getcpu 309 168
getpid 39 172
getppid 110 173
gettid 186 178
getpgrp 111 -
getuid 102 174
geteuid 107 175
getgid 104 176
getegid 108 177
getgroups 115 158
getresuid 118 148
getresgid 120 150
sched_getaffinity 204 123
sched_get_priority_max 146 125
sched_get_priority_min 147 126
getrlimit 97 163
setrlimit 160 164
prlimit64 302 261
prctl 157 167
"""
"""Name, number on x86_64, number on aarch64; '-' where there is none."""

_ANY = 0xFFFFFFFF
_CLONE_THREAD = 0x00010000
_CLONE_OTHER = 0x7E02A080
"""Of the flags of clone those that namespaces (NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME) and
tracing (PTRACE) have."""
_O_TRUNC, _O_TMPFILE, _O_ACCMODE = 0o1000, 0o20000000, 0o3
_OPENING = (_O_TMPFILE | _O_TRUNC | _O_ACCMODE, (0, 1, 2, _O_TRUNC | 1, _O_TRUNC | 2))


@dataclass(frozen=True, slots=True)
class _Test:
    """Holds where the lower 32 bits of an argument, masked, are one of ``values``."""

    argument: int
    mask: int
    values: tuple[int, ...]


_TESTS: dict[str, tuple[_Test, ...]] = {
    "clone": (_Test(0, _CLONE_THREAD | _CLONE_OTHER, (_CLONE_THREAD,)),),
    "kill": (_Test(0, _ANY, (SELF,)),),
    "tgkill": (_Test(0, _ANY, (SELF,)),),
    "prlimit64": (_Test(0, _ANY, (0, SELF)),),
    # PR_SET_NAME, PR_GET_NAME: others would undo the death signal
    "prctl": (_Test(0, _ANY, (15, 16)),),
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
    "ioctl": (_Test(1, _ANY, (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)),),
    # up to F_SETLKW, and F_DUPFD_CLOEXEC: F_SETOWN and F_SETSIG would send signals to others
    "fcntl": (_Test(1, _ANY, (0, 1, 2, 3, 4, 5, 6, 7, 1030)),),
    # Unix stream pairs, which asyncio wakes itself with; a datagram socket could be pointed at a socket of the machine
    "socketpair": (_Test(0, _ANY, (1,)), _Test(1, 0xF, (1,))),
    # no file without a name, which nobody counts; O_TRUNC only to write, which Landlock judges in all its versions
    "open": (_Test(1, *_OPENING),),
    "openat": (_Test(2, *_OPENING),),
}
"""Calls that are allowed only where all of these hold."""


def call_numbers(machine: str) -> dict[str, int]:
    """Return name -> number of the calls that are allowed, some only with certain arguments."""
    column = 1 + list(AUDIT_ARCH).index(machine)
    rows = (line.split() for line in _CALLS.split("\n") if line)
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


# Instructions of classic BPF, as <linux/filter.h> has them: code, jump if true, jump if false, constant.
_LOAD, _AND, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; both machines are little-endian


def _instruction(code: int, constant: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, constant)


_PERMIT = _instruction(_RETURN, _ALLOW)
_REFUSE = _instruction(_RETURN, _ERRNO | errno.EPERM)


def _judge(tests: tuple[_Test, ...]) -> bytes:
    """Return instructions that end with the answer for one call."""
    out = b""
    for test in tests:
        out += _instruction(_LOAD, _ARGUMENTS + 8 * test.argument) + _instruction(_AND, test.mask)
        for left, value in zip(reversed(range(len(test.values))), test.values, strict=True):
            out += _instruction(_JUMP_EQUAL, value, if_true=left + 1)
        out += _REFUSE
    return out + _PERMIT


def seccomp_filter(machine: str) -> bytes:
    """Return the filter for a key of ``AUDIT_ARCH``: 8 bytes an instruction, SELF still in the place of the process id.

    A call of another architecture's table ends the process; others that are not allowed get EPERM or ENOSYS.
    """
    out = _instruction(_LOAD, _ARCH)
    out += _instruction(_JUMP_EQUAL, AUDIT_ARCH[machine], if_true=1) + _instruction(_RETURN, _KILL)
    out += _instruction(_LOAD, _NUMBER)
    if machine == "x86_64":
        out += _instruction(_JUMP_AT_LEAST, _X32_BIT, if_false=1) + _instruction(_RETURN, _KILL)
    for name, number in call_numbers(machine).items():
        answer = _judge(_TESTS.get(name, ()))
        out += _instruction(_JUMP_EQUAL, number, if_false=len(answer) // 8) + answer
    out += _instruction(_JUMP_AT_LEAST, _FIRST_OPTIONAL, if_false=1) + _instruction(_RETURN, _ERRNO | errno.ENOSYS)
    return out + _REFUSE
