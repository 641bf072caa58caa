"""The container recipe names what is there.  It is not built: that needs a daemon and gigabytes."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_tropd.doctor import versions

ROOT = Path(__file__).resolve().parent.parent
RECIPE = (ROOT / "examples" / "container" / "Dockerfile").read_text()
COMMANDS = re.sub(r"^#.*\n", "", RECIPE, flags=re.M).replace("\\\n", " ")


def test_what_it_copies_is_there():
    copied = [name for line in re.findall(r"^COPY (.*)$", COMMANDS, re.M) for name in line.split()[:-1]]
    assert len(copied) >= 8 and all((ROOT / name).exists() for name in copied)
    needed = {"megatron_tropd", "checkpoint_convert", "pyproject.toml", "setup.py", "README.md", "LICENSE"}
    assert needed <= set(copied), "the package is built from these"


def test_every_version_is_that_of_the_repository():
    assert f"ARG SGLANG={versions.SGLANG}\n" in RECIPE
    (constraints,) = set(re.findall(r"-c (\S+)", COMMANDS))
    assert (ROOT / constraints).is_file() and "python3.12" in constraints and (3, 12) in versions.MEGATRON_OF_PYTHON
    for install in re.findall(r"pip install (.*?)(?:&&|$)", COMMANDS, re.M):
        assert f"-c {constraints}" in install or "==" in install or "--no-deps" in install, install


def test_what_is_built_without_isolation_has_its_builder():
    """The image has no setuptools but the pinned one, and no other index is asked while the package is installed."""
    assert "setuptools==" in (ROOT / "requirements" / "runtime.txt").read_text()
    assert "--no-deps --no-build-isolation --editable ." in COMMANDS
