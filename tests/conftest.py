"""Fixtures shared by all tests."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import zlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="tropd-tests-")  # tokens of test data, for all processes
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SGLANG_CPU_FORK", "1")  # SGLang's servers start in half the CPU time (tools/sglang_cpu)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the pools are gloo; on a machine with a GPU the same tests run on its CPU

import hypothesis
import pytest

from megatron_tropd.parallel import platform

platform.install()

from tests.ranks import RankPools  # noqa: E402  (torch must be patched before Megatron is imported)

hypothesis.settings.register_profile("suite", deadline=None)  # a loaded machine is no failure
hypothesis.settings.load_profile("suite")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

_MEASURED: dict[str, tuple[float, float]] = {}
_SERVERS: list = []
"""The shared SGLang servers while they run."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config, items):
    """Tests that need ranks or servers are slow.  Those on the shared servers come last: idle servers and idle ranks
    take time from each other.

    With xdist, a file is run by one worker, and one worker has all tests on the servers.  It begins with them, and the
    files of slow tests come before the others, so that the workers end together (--no-loadscope-reorder)."""
    slow_files = set()
    for item in items:
        on_servers = _needs_servers(item)
        if on_servers or {"ranks", "pool"} & set(item.fixturenames):
            item.add_marker("slow")
        if item.get_closest_marker("slow"):
            slow_files.add(item.path)
        item.user_properties += [("fault", marker.kwargs["number"]) for marker in item.iter_markers("fault")]
        item.add_marker(pytest.mark.xdist_group("sglang" if on_servers else item.path.stem))
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: (not _needs_servers(item), item.path not in slow_files))
    else:
        items.sort(key=_needs_servers)


def pytest_collection_finish(session):
    """Fail if xdist deals out single tests, as it does without a word with a pytest that it does not know."""
    if getattr(session.config.option, "loadgroup", False) and session.items and "@" not in session.items[0].nodeid:
        raise RuntimeError("this pytest-xdist cannot group tests of this pytest; see requirements/test.txt")


def _needs_servers(item) -> bool:
    return "sglang" in item.fixturenames or item.get_closest_marker("servers") is not None


@pytest.fixture(scope="session")
def ranks():
    """Pools of real gloo ranks: ``ranks(2).run(function, *args)``."""
    pools = RankPools()
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def sglang(tmp_path_factory, ranks):
    """Two real SGLang servers with a pool on them; each test pushes weights of its own."""
    from tests.sglang_helpers import NO_SGLANG, PYTHON, start_servers

    if not PYTHON.exists():
        pytest.skip(NO_SGLANG)
    ranks.close()  # whoever needs ranks from here on starts them anew
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_CPU_FORK", "0")  # these two start as on a GPU
        servers = start_servers(tmp_path_factory.mktemp("sglang"))
        servers.run(servers.pool._fleet.wait_until_up())
    _SERVERS.append(servers)
    yield servers
    _close_servers()


@pytest.hookimpl(trylast=True)  # after the fixtures of the test and of its file
def pytest_runtest_teardown(item, nextitem):
    """The shared servers end with the last test that needs them: idle ones take a tenth of the machine."""
    if nextitem is not None and not _needs_servers(nextitem):
        _close_servers()


def _close_servers() -> None:
    while _SERVERS:
        _SERVERS.pop().pool.close()


@pytest.fixture(autouse=True)
def weights_of_this_test(request):
    """On the shared servers a test has the same weights whatever ran before it."""
    if "sglang" in request.fixturenames:
        student = request.getfixturevalue("sglang").student
        student.seed = 100 * zlib.crc32(f"{request.path.name}::{request.node.name}".encode())


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A process whose system calls fail as it is told (tests/failing_disk.py)."""
    from tests.failing_disk import FailingDisk, compile_library

    library, why = compile_library(tmp_path_factory.mktemp("library"))
    if library is None:
        pytest.skip(why)
    process = FailingDisk(library)
    yield process
    process.close()


@pytest.fixture
def measured():
    """``measured(claim, error, limit)``: fail above the limit, and print the worst error of each claim at
    the end of the run (``make verify``; docs/verification.md)."""

    def note(claim: str, error: float, limit: float) -> None:
        worst, _ = _MEASURED.get(claim, (0.0, limit))
        _MEASURED[claim] = (max(worst, error), limit)
        assert error <= limit, f"{claim}: {error:.2e} is above {limit:.0e}"

    return note


@pytest.fixture
def seen(record_property):
    """``seen(detect_s=..., recover_s=..., steps_lost=...)``: figures of a fault, for the table of ``make faults``."""

    def note(**figures: float) -> None:
        for name, value in figures.items():
            record_property(name, value)

    return note


def pytest_terminal_summary(terminalreporter):
    if not _MEASURED:
        return
    terminalreporter.section("measured errors")
    terminalreporter.write_line("| claim | measured | limit |\n|---|---|---|")
    for claim, (error, limit) in _MEASURED.items():
        terminalreporter.write_line(f"| {claim} | {error:.1e} | {limit:.0e} |")
