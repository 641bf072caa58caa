"""The sandbox against hostile programs, as this user and, where this is root, as one without rights."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_tropd.sandbox import Limits
from megatron_tropd.sandbox import run as runs
from megatron_tropd.sandbox.machine import this_machine
from megatron_tropd.sandbox.outcome import MIB
from megatron_tropd.sandbox.watch import Watch
from tests.sandbox_helpers import ROOT, SECRET, Mine, Nobodys, open_place
from tests.waiting import wait_for

pytestmark = pytest.mark.skipif(bool(this_machine().missing), reason=" ".join(this_machine().missing))
USERS = [Mine] + [Nobodys] * (os.getuid() == 0)


@pytest.fixture(scope="module", params=USERS, ids=lambda user: user.__name__)
def runner(request):
    with open_place() as place:
        users = request.param(place)
        yield users
        assert users("print(6 * 7)").stdout == "42\n"
        users.close()


@pytest.fixture
def run(runner):
    """Runs a program, after which nothing is left of it and nothing outside has changed."""
    before = runner.place.state()
    yield runner
    assert runner.place.state() == before
    assert not list(runner.place.runs.iterdir())
    assert not runner.place.processes()


FIVE = Limits(cpu_s=3, wall_s=4, memory_bytes=128 * MIB)
"""Each ends within five seconds, however loaded the machine: the wall clock ends what gets no CPU."""
SHORT = Limits(cpu_s=0.2, memory_bytes=256 * MIB)
"""For what only the CPU clock ends."""
BRIEF = Limits(wall_s=0.4)
"""For what only the wall clock ends."""


@pytest.mark.parametrize(
    ("source", "verdict"),
    [
        ("while True: pass", "timeout"),
        ("held = []\nwhile True: held.append(bytearray(1 << 24))", "memory"),
        ("import os\nwhile True: os.fork()", "forbidden"),
        ("import socket; socket.create_connection(('127.0.0.1', 80))", "forbidden"),
        ("open({secret!r}, 'w').write('mine')", "forbidden"),
        ("import os; os.kill(os.getppid(), 9)", "forbidden"),
        ("import sys\nfor _ in range(1024): sys.stdout.write('x' * (1 << 20))", "output"),
    ],
    ids=["endless loop", "memory", "forks", "socket", "write outside", "kill of the parent", "1 GiB of output"],
)
@pytest.mark.fault(number=32)
def test_each_attack_is_contained_within_five_seconds(run, source, verdict):
    limits = replace(FIVE, cpu_s=0.3) if verdict == "timeout" else FIVE
    outcome = run(source.format(secret=str(run.place.secret)), limits=limits)
    assert outcome.verdict == verdict and outcome.detail
    assert outcome.wall_s < 5
    assert run("print('alive')").stdout == "alive\n"


REFUSED = [
    "open({secret!r})", "open({secret!r}, 'a')", "os.open({secret!r}, os.O_RDONLY | os.O_TRUNC)",
    "os.truncate({secret!r}, 0)", "os.remove({secret!r})", "os.chmod({secret!r}, 0)", "os.utime({secret!r})",
    "os.setxattr({secret!r}, 'user.a', b'')", "os.chown({secret!r}, -1, -1)", "os.listdir({place!r})",
    "os.mkdir({place!r} + '/made')", "os.rename({secret!r}, 'stolen')", "os.link({secret!r}, 'linked')",
    "os.symlink({secret!r}, 'linked')", "os.mkfifo('fifo')", "os.mknod('node')", "open({root!r} + '/.git')",
    "os.listdir({home!r})", "open('/etc/passwd')", "open('/dev/shm/made', 'w')", "os.listdir('/proc')",
    "open('../main.py', 'a')", "open('../stdin', 'a')", "os.fchmod(os.open('../stdin', os.O_RDONLY), 0)",
    "open('/proc/%d/environ' % os.getppid())", "open('/proc/%d/mem' % os.getppid())", "open('/proc/self/mem')",
    "os.open('.', os.O_TMPFILE | os.O_RDWR)", "os.memfd_create('held')",
    "os.open('../stdin', os.O_TRUNC)", "os.open('shut', os.O_CREAT, 0) and open('shut')", "os.kill(os.getppid(), 0)", "os.kill(-1, 0)", "os.kill(0, 0)", "os.killpg(1, 0)", "os.setsid()", "fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())",
    "fcntl.ioctl(0, 0x5412, b'x')", "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "os.sched_setaffinity(os.getppid(), [0])", "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))",
    "os.setuid(0)", "os.chroot('.')", "os.forkpty()", "os.execv('/bin/sh', ['sh'])", "os.posix_spawn('/bin/sh', ['sh'], {{}})",
    "subprocess.run(['/bin/true'])", "multiprocessing.Pool(1)", "socket.socket()", "socket.socket(socket.AF_UNIX)",
    "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
]  # fmt: skip


def refused(place):
    """A program that prints what of REFUSED was done."""
    paths = {"secret": place.secret, "place": place.outside, "root": ROOT, "home": os.path.expanduser("~")}
    source = "import fcntl, multiprocessing, os, resource, signal, socket, subprocess, sys\n"
    for statement in REFUSED:
        statement = statement.format(**{name: str(path) for name, path in paths.items()})
        source += f"try: {statement}; print({statement!r}, 'was done')\nexcept PermissionError: pass\n"
    return source


def test_what_is_refused(run):
    outcome = run(refused(run.place))
    assert (outcome.verdict, outcome.stdout) == ("ok", ""), outcome.stderr


def test_the_first_version_of_landlock_is_enough(monkeypatch):
    oldest = replace(this_machine(), landlock_abi=1)
    monkeypatch.setattr(runs, "this_machine", lambda: oldest)
    with open_place() as place:
        before = place.state()
        outcome = Mine(place)(refused(place))
        assert (outcome.verdict, outcome.stdout) == ("ok", ""), outcome.stderr
        assert place.state() == before


P, S = "os.getppid()", 0
RAW_CALLS = {
    "kill": (62, P, 0), "tkill": (200, P, 0), "rt_sigqueueinfo": (129, P, 0, S), "pidfd_open": (434, P, 0),
    "ptrace": (101, 16, P), "process_vm_readv": (310, P, S, 1, S, 1), "process_vm_writev": (311, P, S, 1, S, 1),
    "clone": (56, 17, 0), "clone with shared memory": (56, 0x111, 0), "vfork": (58,), "fork": (57,), "clone3": (435, S, 64),
    "execve": (59, S, S, S), "execveat": (322, 0, S, 0, 0, 0), "socket": (41, 2, 1), "io_uring_setup": (425, 8, S),
    "unshare": (272, 0x10000000), "setns": (308, 0, 0), "mount": (165, S, S, S, 0, 0), "chroot": (161, S),
    "memfd_create": (319, S, 0), "memfd_secret": (447, 0), "shmget": (29, 0, 4096, 0o1600), "msgget": (68, 0, 0o1600),
    "semget": (64, 0, 1, 0o1600), "mq_open": (240, S, 0o102, 0o600, 0), "splice": (275, 0, 0, 1, 0, 1, 0),
    "bpf": (321, 0, S, 8), "perf_event_open": (298, S, 0, -1, -1, 0), "userfaultfd": (323, 1), "keyctl": (250, 0, -3, 1),
    "seccomp": (317, 1, 0, S), "prctl(PR_SET_PDEATHSIG)": (157, 1, 0), "personality": (135, 0x40000), "setsid": (112,),
    "fanotify_init": (300, 0, 0), "inotify_init1": (294, 0), "name_to_handle_at": (303, -100, S, S, S, 0),
    "openat2": (437, -100, S, S, 24), "fchmodat2": (452, -100, S, 0, 0), "setresuid": (117, 0, 0, 0), "capset": (126, S, S),
}  # fmt: skip


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of this machine")
def test_system_calls_without_a_library(run):
    """Each fails with EPERM or ENOSYS; another error would come from the call itself, and mean that it was tried."""
    source = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    for name, arguments in RAW_CALLS.items():
        source += f"status = libc.syscall({', '.join(f'ctypes.c_long({argument})' for argument in arguments)})\n"
        source += f"if status != -1 or ctypes.get_errno() not in (1, 38): print({name!r}, ctypes.get_errno())\n"
    outcome = run(source)
    assert (outcome.verdict, outcome.stdout) == ("ok", ""), outcome.stderr


@pytest.mark.skipif(platform.machine() != "x86_64", reason="tables of system calls that only this machine has")
@pytest.mark.parametrize("code", [b"\xb8\x14\x00\x00\x00\xcd\x80\xc3", b"\xb8\x27\x00\x00\x40\x0f\x05\xc3"])
def test_other_tables_of_system_calls_are_fatal(run, code):
    """Getpid by int 0x80, and with the numbers of x32."""
    source = (
        "import ctypes, mmap\n"
        f"page = mmap.mmap(-1, 4096, prot=7)\npage.write({code!r})\n"
        "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()\nprint('done')"
    )
    outcome = run(source)
    assert (outcome.verdict, outcome.stdout, outcome.exit_code) == ("forbidden", "", None), outcome


def test_files_and_pipes_of_the_parent_cannot_be_opened_through_proc(run):
    reading, writing = os.pipe()
    os.write(writing, SECRET.encode())
    source = (
        f"import os\nfor parent in (os.getppid(), {os.getpid()}):\n for number in range(100):\n  for flags in (0, 1):\n"
        "   try: print(os.open(f'/proc/{parent}/fd/{number}', flags))\n   except OSError: pass"
    )
    try:
        outcome = run(source)
        assert (outcome.verdict, outcome.stdout) == ("ok", ""), outcome.stderr
    finally:
        os.close(reading)
        os.close(writing)


TIMEOUT, OUTPUT, MEMORY = {"timeout"}, {"output"}, {"memory"}
SOME = Limits(file_bytes=8 * MIB, output_bytes=MIB)
UNBOUNDED = "import sys\nsys.setrecursionlimit(10**9)\n"
ATTACKS = {
    "forks, whatever happens": ("import os\nwhile True:\n try: os.fork()\n except OSError: pass", SHORT, TIMEOUT),
    "deaf to signals": (
        "import signal\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        SHORT, TIMEOUT,
    ),
    "deaf to exceptions": ("while True:\n try:\n  while True: pass\n except BaseException: pass", SHORT, TIMEOUT),
    "threads that work": (
        "import threading\nfor _ in range(4): threading.Thread(target=lambda: any(iter(int, 1))).start()", SHORT, TIMEOUT
    ),
    "threads that wait": (
        "import threading, time\nthreading.stack_size(1 << 15)\n"
        "while True: threading.Thread(target=time.sleep, args=(60,)).start()",
        Limits(), {"forbidden"},
    ),
    "41 threads": (
        "import threading, time\nfor _ in range(40): threading.Thread(target=time.sleep, args=(60,)).start()",
        Limits(threads=40, wall_s=20), {"forbidden"},
    ),
    "sleeps": ("import time; time.sleep(1000)", BRIEF, TIMEOUT),
    "closes its streams": ("import os, time; [os.close(n) for n in range(3)]; time.sleep(1000)", BRIEF, TIMEOUT),
    "stops itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", BRIEF, TIMEOUT),
    "waits for itself": ("import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()", BRIEF, TIMEOUT),
    "lines without end": ("while True: print()", SOME, OUTPUT),
    "errors without end": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", SOME, OUTPUT),
    "bytes that are no text": ("import os\nwhile True: os.write(1, b'\\xff\\0\\n' * 1000)", SOME, OUTPUT),
    "100000 files": ("for n in range(100000): open(str(n), 'w').close()", Limits(), OUTPUT),
    "directories in each other": ("import os\nwhile True: os.mkdir('d'); os.chdir('d')", Limits(files=10**6), OUTPUT),
    "large files": ("for n in range(50): open(str(n), 'w').write('x' * (1 << 20))", SOME, OUTPUT),
    "a large file": ("open('large', 'w').write('x' * (9 << 20))", SOME, {"error", "output"}),
    "a file without content": (
        "import os\nos.posix_fallocate(os.open('large', 65), 0, 9 << 20)", SOME, {"error", "output"}
    ),
    "files that cannot be read": (
        "import os, time\nos.mkdir('d', 0)\nos.open('e', os.O_CREAT, 0)\ntime.sleep(0.2)", Limits(), {"ok", "output"}
    ),
    "recursion in Python": (
        UNBOUNDED + "def f(): f()\nf()", SHORT, {"memory", "killed", "error", "timeout"}
    ),
    "recursion in C": (
        UNBOUNDED + "class A:\n def __getattr__(self, name): return getattr(self, name)\nA().a",
        Limits(memory_bytes=256 * MIB), {"memory", "killed", "error"},
    ),
    "a wild pointer": ("import ctypes; ctypes.string_at(0)", Limits(), {"killed"}),
    "an abort": ("import os; os.abort()", Limits(), {"killed"}),
    "one large string": ("x = 'x' * (1 << 40)", Limits(), MEMORY),
    "many small objects": ("x = []\nwhile True: x.append([])", Limits(memory_bytes=96 * MIB), MEMORY),
    "a large mapping": ("import mmap; mmap.mmap(-1, 1 << 30)", Limits(), {"memory", "error"}),
    "brackets without end": ("x = " + "(" * 100000 + ")" * 100000, Limits(), {"error", "memory"}),
    "signs without end": ("x = " + "-" * 10**6 + "1", Limits(), {"error", "memory", "killed"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_more_attacks(run, name):
    source, limits, verdicts = ATTACKS[name]
    outcome = run(source, limits=limits)
    assert outcome.verdict in verdicts, outcome
    assert outcome.verdict == "ok" or outcome.detail
    assert len(outcome.stdout) + len(outcome.stderr) <= limits.output_bytes
    assert limits is not BRIEF or outcome.wall_s < 5


def test_the_watch_measures_cpu_time_and_the_kernel_holds_the_limit_without_it(monkeypatch):
    """In CPU time, which the load of the machine does not change."""
    spent = []
    with open_place() as place:
        for look in (Watch._excess, lambda _watch: None):
            monkeypatch.setattr(Watch, "_excess", look)
            before = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
            assert Mine(place)("while True: pass", limits=Limits(cpu_s=0.2)).verdict == "timeout"
            spent.append(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - before)
    assert 0.2 <= spent[0] < 1 < spent[1] < 3


def test_a_program_dies_with_its_parent():
    """Also one that ignores what it can; the parent here is killed, so nothing is tidied."""
    with open_place() as place:
        command = [sys.executable, "-m", "megatron_tropd.sandbox"]
        parent = subprocess.Popen(
            command, stdin=subprocess.PIPE, cwd=ROOT, text=True, env={**os.environ, "TMPDIR": str(place.runs)}
        )
        parent.stdin.write("{\"source\": \"import time\\nopen('started', 'w').close()\\ntime.sleep(600)\"}\n")
        parent.stdin.flush()
        wait_for(lambda: list(place.runs.rglob("started")))
        assert place.processes()
        parent.kill()
        parent.communicate()
        wait_for(lambda: not place.processes())
