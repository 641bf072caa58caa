"""One message on a node, and never none because something is wrong with the record."""

from __future__ import annotations

import fcntl
import io
import os
import sys
import threading

import pytest

from megatron_tropd.parallel import print_once as module
from megatron_tropd.parallel.print_once import RECORD, Importance, print_once

CAUSE, CONSEQUENCE = Importance.CAUSE, Importance.CONSEQUENCE


@pytest.fixture
def launch(monkeypatch, tmp_path):
    """The directory of a launch, as torchrun tells local rank 1 of it."""
    (tmp_path / "1").mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "1" / "error.json"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    return tmp_path


def test_a_cause_is_printed_once_and_after_it_no_consequence(launch, capsys):
    for text, importance in (
        ("sig", CONSEQUENCE),
        ("sig", CONSEQUENCE),
        ("why", CAUSE),
        ("why", CAUSE),
        ("sig", CONSEQUENCE),
    ):
        print_once(text, importance)
    assert capsys.readouterr().err == "sig\nwhy\n"


def test_every_launch_prints(launch, capsys, monkeypatch, tmp_path):
    print_once("first", CAUSE)
    (tmp_path / "attempt_1" / "1").mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_1" / "1" / "error.json"))
    print_once("restarted", CAUSE)
    assert capsys.readouterr().err == "first\nrestarted\n"


def test_ranks_that_come_together_print_once(launch, capsys):
    start = threading.Barrier(8)

    def rank():
        start.wait()
        print_once("it", CAUSE)

    threads = [threading.Thread(target=rank) for _ in range(8)]  # a lock belongs to an open file, as with processes
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capsys.readouterr().err == "it\n"


@pytest.mark.parametrize(
    ("error_file", "local_rank"),
    [
        (None, None),
        (None, "1"),
        ("", "1"),
        ("/dev/null", "1"),
        ("/tmp/of_a_scheduler.json", None),
        ("/gone/1/error.json", "1"),
    ],
)
def test_without_a_launch_of_torchrun_each_process_prints(monkeypatch, capsys, error_file, local_rank):
    for name, value in (("TORCHELASTIC_ERROR_FILE", error_file), ("LOCAL_RANK", local_rank)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    print_once("it", CAUSE)
    print_once("it", CAUSE)
    assert capsys.readouterr().err == "it\nit\n"


@pytest.mark.parametrize("fault", ["a directory", "a full disk", "nonsense", "no lock"])
def test_a_record_that_cannot_be_used_hides_nothing(launch, capsys, monkeypatch, fault):
    record = launch / RECORD
    if fault == "a directory":
        record.mkdir()
    elif fault == "a full disk":
        record.symlink_to("/dev/full")
    elif fault == "nonsense":
        record.write_text("nonsense")
    else:
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks here")))
    print_once("it", CAUSE)
    assert capsys.readouterr().err == "it\n"
    print_once("it", CAUSE)
    assert capsys.readouterr().err == ("" if fault in ("nonsense", "no lock") else "it\n")


def test_a_rank_waits_until_another_has_printed(launch, capsys):
    record = os.open(launch / RECORD, os.O_RDWR | os.O_CREAT)
    fcntl.flock(record, fcntl.LOCK_EX)
    waiting = threading.Thread(target=print_once, args=("it", CAUSE))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    os.pwrite(record, b"%d" % CAUSE, 0)
    os.close(record)
    waiting.join()
    assert capsys.readouterr().err == ""


def test_a_rank_that_hangs_while_it_prints_hides_nothing(launch, capsys, monkeypatch):
    monkeypatch.setattr(module, "_LOCK_S", 0.05)
    with (launch / RECORD).open("w") as record:
        fcntl.flock(record, fcntl.LOCK_EX)
        print_once("it", CAUSE)
    assert capsys.readouterr().err == "it\n"


def test_a_rank_that_cannot_print_leaves_it_to_another(launch, capsys):
    with open(os.devnull, "w") as null:  # as torchrun --local-ranks-filter has it
        print_once("it", CAUSE, null)
    print_once("it", CAUSE, null)  # closed
    with io.TextIOWrapper(open("/dev/full", "wb", buffering=0), write_through=True) as full:
        print_once("it", CAUSE, full)
    print_once("it", CAUSE, sys.stdout)
    assert capsys.readouterr() == ("it\n", "")
