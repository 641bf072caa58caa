"""Sandboxes of this user and of one without rights, and things outside that no program may reach."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from megatron_tropd.sandbox import Limits, Outcome, run_python

ROOT = Path(__file__).resolve().parent.parent
NOBODY = 65534
SECRET = "the secret of the house"


@dataclass(frozen=True)
class Place:
    """A directory that everybody may read and write, so that only the sandbox protects it."""

    path: Path
    runs: Path
    """The temporary directory of the sandbox."""

    @property
    def outside(self):
        return self.path / "outside"

    @property
    def secret(self):
        return self.outside / "secret"

    def state(self):
        """What a program may not change: names, contents, modes and times."""
        return [
            (p.name, p.is_dir() or p.read_text(), (s := p.lstat()).st_mode, s.st_uid, s.st_nlink, s.st_mtime_ns)
            for p in (self.outside, *sorted(self.outside.iterdir()))
        ]

    def processes(self):
        """Processes that were started in a run here: its directory is among their arguments."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended
                if os.fsencode(f"{self.runs}/tropd-sandbox-") in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return found


@contextlib.contextmanager
def open_place():
    """A place with a secret in it."""
    path = Path(tempfile.mkdtemp(prefix="sandbox-test-"))  # tmp_path is below a directory that only its owner may enter
    place = Place(path, path / "runs")
    for folder in (path, place.runs, place.outside):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o777)
    place.secret.write_text(SECRET)
    place.secret.chmod(0o666)
    try:
        yield place
    finally:
        shutil.rmtree(path)


class Mine:
    """Runs programs as this user."""

    def __init__(self, place):
        self.place = place

    def __call__(self, source, *, stdin="", limits=None):
        before, tempfile.tempdir = tempfile.tempdir, str(self.place.runs)
        try:
            return run_python(source, stdin=stdin, limits=limits or Limits())
        finally:
            tempfile.tempdir = before

    def close(self):
        pass


class Nobodys:
    """Runs programs as a user without rights, by ``python -m megatron_tropd.sandbox``, from a copy of the package."""

    def __init__(self, place):
        self.place = place
        library = place.path / "library"
        shutil.copytree(ROOT / "megatron_tropd" / "sandbox", library / "megatron_tropd" / "sandbox")
        shutil.copy(ROOT / "megatron_tropd" / "__init__.py", library / "megatron_tropd")
        self.process = subprocess.Popen(
            [python_for_nobody(), "-B", "-m", "megatron_tropd.sandbox"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=place.path,
            env={"PYTHONPATH": str(library), "TMPDIR": str(place.runs), "PATH": os.environ["PATH"]},
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
        )

    def __call__(self, source, *, stdin="", limits=None):
        request = {"id": 7, "source": source, "stdin": stdin, "limits": asdict(limits or Limits())}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert answer.pop("id") == 7
        return Outcome(**answer)

    def close(self):
        self.process.communicate()
        assert self.process.returncode == 0


def python_for_nobody():
    """An interpreter that a user without rights can start; skips the test where there is none."""
    for python in (sys.executable, sys._base_executable, shutil.which("python3", path="/usr/local/bin:/usr/bin")):
        with contextlib.suppress(OSError, TypeError):
            command = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 10))"]
            if not subprocess.run(command, user=NOBODY, capture_output=True, cwd="/", check=False).returncode:
                return python
    pytest.skip("no Python 3.10 that another user can start")
