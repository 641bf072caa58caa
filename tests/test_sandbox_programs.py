"""What honest programs can do in the sandbox, what an Outcome says of them, and what is no Outcome but an error."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_tropd.sandbox import Limits, Request, SandboxError, check, run_many, run_python
from megatron_tropd.sandbox import __main__ as command
from megatron_tropd.sandbox import run as runs
from megatron_tropd.sandbox.directory import excess, remove
from megatron_tropd.sandbox.machine import Machine, this_machine
from tests.sandbox_helpers import ROOT
from tests.waiting import wait_for

confined = pytest.mark.skipif(bool(this_machine().missing), reason=" ".join(this_machine().missing))
NUMPY = str(Path(importlib.util.find_spec("numpy").origin).parent.parent)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield
    assert not list(tmp_path.glob("tropd-sandbox-*"))


PROGRAMS = {
    "stdin": ("print(sum(map(int, input().split())), input())", "1 2\nend", "3 end\n"),
    "stdin as a file": ("print(open(0).read(), end='')", "\u20ac\n", "\u20ac\n"),
    "stdin as a device": ("print(open('/dev/stdin').read(), end='')", "a\n", "a\n"),
    "20 MB of stdin": ("import sys; print(len(sys.stdin.read()))", "x" * 20_000_000, "20000000\n"),
    "1 MB of stdout": ("print('x' * 1_000_000)", "", "x" * 1_000_000 + "\n"),
    "bytes that are no text": ("import os; os.write(1, b'a\\xff\\0')", "", "a\ufffd\0"),
    "a surrogate of stdin": ("import sys; print(len(sys.stdin.buffer.read()))", "\ud800", "3\n"),
    "text that is not ASCII": ("print('\u20ac' * 2)", "", "\u20ac\u20ac\n"),
    "exit": ("print(1); exit()", "", "1\n"),
    "own files": (
        "import os\nos.mkdir('d')\nwith open('d/f', 'w') as f: f.write('7')\nprint(open('d/f').read(), os.listdir())",
        "", "7 ['d']\n",
    ),
    "a module of its own": ("open('mine.py', 'w').write('x = 5')\nimport mine\nprint(mine.x)", "", "5\n"),
    "the main module": (
        "import pickle, __main__\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is __main__.A, __name__)",
        "", "True __main__\n",
    ),
    "a deep thread": (
        "import sys, threading\nthreading.stack_size(1 << 28)\nsys.setrecursionlimit(10**6)\n"
        "def f(n): return n and 1 + f(n - 1)\nt = threading.Thread(target=lambda: print(f(50000)))\nt.start()\nt.join()",
        "", "50000\n",
    ),
    "many threads": (
        "from concurrent.futures import ThreadPoolExecutor\nprint(sum(ThreadPoolExecutor(32).map(int, '1' * 100)))", "", "100\n"
    ),
    "asyncio": ("import asyncio\nasync def f(): await asyncio.sleep(0.001); print(1)\nasyncio.run(f())", "", "1\n"),
    "a signal of its own": (
        "import os, signal\nsignal.signal(10, lambda *_: print('got'))\nos.kill(os.getpid(), 10)\nsignal.raise_signal(10)",
        "", "got\ngot\n",
    ),
    "an alarm": ("import signal\nsignal.signal(14, lambda *_: print(1))\nsignal.setitimer(0, 0.001)\nsignal.pause()", "", "1\n"),
    "the library": (
        "import bisect, collections, copy, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq, itertools\n"
        "import json, math, operator, random, re, sqlite3, statistics, string, textwrap, time, typing, uuid, zoneinfo\n"
        "print(zoneinfo.ZoneInfo('UTC'), sqlite3.connect(':memory:').execute('select 1').fetchone())",
        "", "UTC (1,)\n",
    ),
    "hashes": ("print(hash('a') == hash('a'), list({'x', 'y', 'z', 'w'}))", "", None),
    "the environment": ("import os, sys; print(sorted(os.environ.values()), sys.flags.no_site)", "", None),
}  # fmt: skip


@confined
@pytest.mark.parametrize("name", PROGRAMS)
def test_honest_programs(name, monkeypatch):
    source, stdin, stdout = PROGRAMS[name]
    monkeypatch.setenv("TOKEN", "of the parent")
    monkeypatch.setenv("PYTHONPATH", NUMPY)
    outcome = run_python(source, stdin=stdin)
    assert (outcome.verdict, outcome.exit_code, outcome.detail, outcome.stderr) == ("ok", 0, "", "")
    assert "of the parent" not in outcome.stdout
    if stdout is not None:
        assert outcome.stdout == stdout
    elif name == "hashes":
        assert run_python(source).stdout == outcome.stdout


@confined
@pytest.mark.parametrize(
    ("source", "exit_code", "stdout", "detail"),
    [
        ("print(1)\nimport sys; sys.exit(3)", 3, "1\n", "exit code 3"),
        ("print(1)\nraise ValueError('x')", 1, "1\n", "ValueError: x"),
        ("import sys; sys.exit('why')", 1, "", "why"),
        ("print(input())", 1, "", "EOFError: EOF when reading a line"),
        ("x = ", 1, "", "SyntaxError: invalid syntax"),
        ("print(1)\0", 1, "", "null bytes"),
        ("'\ud800'", 1, "", "SyntaxError"),
        ("import pytest", 1, "", "ModuleNotFoundError: No module named 'pytest'"),
        ("import launcher", 1, "", "ModuleNotFoundError"),
        ("import threading\nthreading.Thread(target=lambda: 1 / 0).start()\nexit(2)", 2, "", "ZeroDivisionError"),
        ("def f(): f()\nf()", 1, "", "RecursionError"),
    ],
)
def test_errors_of_the_program(source, exit_code, stdout, detail):
    outcome = run_python(source)
    assert (outcome.verdict, outcome.exit_code, outcome.stdout) == ("error", exit_code, stdout)
    assert detail in outcome.detail


@confined
def test_a_traceback_begins_in_the_program():
    outcome = run_python("def f():\n    raise ValueError('x')\nf()")
    assert outcome.stderr.count("File ") == 2 and "line 3" in outcome.stderr and "launcher" not in outcome.stderr


@confined
def test_a_program_cannot_feign_that_it_was_not_run():
    """What the launcher says travels on a descriptor that is closed before the program begins."""
    source = (
        "import os\nfor fd in range(3, 64):\n try: os.write(fd, b'x'); print(fd)\n except OSError: pass\nos._exit(121)"
    )
    outcome = run_python(source)
    assert (outcome.verdict, outcome.exit_code, outcome.stdout) == ("error", 121, "")


@confined
def test_packages_that_are_allowed():
    source = "import numpy; print(numpy.ones(3).sum())\nopen(numpy.__file__, 'a')"
    outcome = run_python(source, site_packages=[NUMPY])
    assert (outcome.verdict, outcome.stdout) == ("forbidden", "3.0\n"), outcome.stderr


@confined
def test_output_is_what_counts_not_its_moment():
    """A program that ends at once after its last byte over the limit has broken it too."""
    limits = Limits(output_bytes=1000)
    assert run_python("print('x' * 999)", limits=limits).verdict == "ok"
    outcome = run_python("print('x' * 1000)", limits=limits)
    assert outcome.verdict == "output" and outcome.stdout == "x" * 1000


@confined
def test_many_run_side_by_side_and_answers_keep_their_order():
    requests = [Request(source=f"import time; time.sleep({0.3 - n / 20}); print({n})") for n in range(6)]
    start = time.monotonic()
    outcomes = run_many(requests, workers=6)
    assert [outcome.stdout for outcome in outcomes] == [f"{n}\n" for n in range(6)]
    assert time.monotonic() - start < sum(outcome.wall_s for outcome in outcomes)


@confined
def test_an_interrupted_run_leaves_no_process(tmp_path, monkeypatch):
    """Control-C arrives while the parent waits for a program that has begun."""
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: started.append(popen(*args, **more)) or started[0])

    def interrupt():
        wait_for(lambda: list(tmp_path.rglob("begun")))
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            run_python("import time; open('begun', 'w').close(); time.sleep(1000)", limits=Limits(wall_s=200))
    finally:
        signal.signal(signal.SIGINT, before)
    assert started[0].returncode == -signal.SIGKILL


@confined
def test_a_parent_that_does_not_learn_of_its_children_gets_no_verdict():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(SandboxError, match="SIGCHLD"):
            run_python("print(1)")
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"python": "no-such-python"}, "no-such-python"),
        ({"python": "/bin/true"}, "/bin/true could not be confined"),
        ({"site_packages": ["/no/such/place"]}, "/no/such/place"),
    ],
)
@confined
def test_what_cannot_be_run_is_an_error(arguments, said):
    with pytest.raises(SandboxError, match=said):
        run_python("print(1)", **arguments)


@pytest.mark.parametrize(
    "limits", [{"cpu_s": 0}, {"wall_s": float("inf")}, {"wall_s": float("nan")}, {"files": -1}, {"memory_bytes": 1 << 20},
               {"output_bytes": 1.5}, {"threads": "4"}]
)  # fmt: skip
def test_limits_that_are_none(limits):
    with pytest.raises(ValueError, match=next(iter(limits))):
        Limits(**limits)


def test_a_machine_that_cannot_confine_runs_nothing_unless_asked(monkeypatch):
    bare = Machine(landlock_abi=0, calls=b"", missing=("Files cannot be restricted.", "Network cannot be restricted."))
    monkeypatch.setattr(runs, "this_machine", lambda: bare)
    with pytest.raises(SandboxError, match=r"Files cannot be restricted\.  Network cannot.*allow_weaker"):
        run_python("print(1)")
    outcome = run_python("import os; print(1, os.path.exists('/etc/passwd'))", allow_weaker=True)
    assert (outcome.verdict, outcome.stdout) == ("ok", "1 True\n")
    assert run_python("while True: pass", limits=Limits(cpu_s=0.2), allow_weaker=True).verdict == "timeout"
    assert run_python("x = 'x' * (1 << 40)", allow_weaker=True).verdict == "memory"


@confined
def test_this_machine_confines_and_a_container_that_hides_it_is_found_out():
    """The second is real: inside the sandbox, neither Landlock nor seccomp filters can be had."""
    assert check() == []
    source = "from megatron_tropd.sandbox import check\nprint(*check(), sep='\\n')"
    lines = run_python(source, site_packages=[str(ROOT)]).stdout.splitlines()
    assert [line.split(",")[0] for line in lines] == ["Files cannot be restricted", "Network"]
    assert "profile" in lines[0]


def test_a_kernel_that_does_not_do_what_it_says_is_found_out(monkeypatch):
    bare = Machine(landlock_abi=0, calls=b"")
    monkeypatch.setattr(runs, "this_machine", lambda: bare)
    monkeypatch.setattr("megatron_tropd.sandbox.trial.this_machine", lambda: bare)
    found = " ".join(check())
    assert "network: a socket" in found and "files: a file outside" in found and "signals" in found


def test_what_is_too_much_in_a_directory(tmp_path):
    def found(**limits):
        return excess(str(tmp_path), **{"file_bytes": 10_000, "files": 60} | limits)

    (tmp_path / "/".join("d" * 32)).mkdir(parents=True)
    (tmp_path / "d" / "f").write_bytes(b"x" * 4000)
    assert found() == ""
    assert "bytes" in found(file_bytes=3999) and "32 files" in found(files=32) and found(files=33) == ""
    (tmp_path / "/".join("d" * 33)).mkdir()
    assert "inside each other" in found()


def test_a_tree_of_any_depth_and_mode_is_removed(tmp_path):
    top = tmp_path / "run"
    (top / "work").mkdir(parents=True)
    place = os.open(top / "work", os.O_RDONLY)
    for _ in range(300):
        os.mkdir("a directory with a name", dir_fd=place)
        os.close(os.open("file", os.O_CREAT, 0, dir_fd=place))
        below = os.open("a directory with a name", os.O_RDONLY, dir_fd=place)
        os.fchmod(place, 0)
        os.close(place)
        place = below
    os.close(place)
    remove(str(top))
    assert not top.exists()


def test_json_lines(capsys):
    lines = [
        '{"id": "a", "source": "print(input())", "stdin": "x", "limits": {"cpu_s": 2}}',
        '{"id": [1], "source": "import time\\nwhile True: pass", "limits": {"cpu_s": 0.2}}',
        '{"id": "c", "source": "", "limits": {"cpu": 2}}', '{"id": "d"}', '{"id": "e", "source": 5}', "{", "7",
        "[" * 100000,
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "megatron_tropd.sandbox", "--workers", "2"],
        input="\n".join(lines), capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    by_id = {str(answer.get("id")): answer for answer in answers}
    assert len(answers) == len(lines)
    assert by_id["a"]["verdict"] == "ok" and by_id["a"]["stdout"] == "x\n"
    assert by_id["[1]"]["verdict"] == "timeout"
    assert "'cpu'" in by_id["c"]["error"] and "source" in by_id["d"]["error"] and by_id["e"]["error"]
    with pytest.raises(SystemExit):
        command.main(["--workers", "0"])
    assert "--workers" in capsys.readouterr().err


def test_it_needs_nothing_but_python():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import megatron_tropd.sandbox.__main__; print(*sys.modules)"
    names = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(ROOT)], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    allowed = sys.stdlib_module_names | {"megatron_tropd", "__main__"}
    assert {name.split(".")[0] for name in names} <= allowed
