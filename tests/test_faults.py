"""``make faults``: every row of the matrix has a test, and the table says what the tests gave."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.faults.matrix import FAULTS
from tools.faults.run import Outcome, outcomes, replace_table, table

ROOT = Path(__file__).resolve().parent.parent
TESTS = """
import pytest

@pytest.mark.fault(number=2)
@pytest.mark.fault(number=4)
@pytest.mark.parametrize("seconds", [3.0, 5.0])
def test_passes(record_property, seconds):
    record_property("detect_s", seconds)
    record_property("steps_lost", 1)

@pytest.mark.fault(number=4)
def test_fails():
    assert False

@pytest.mark.fault(number=6)
def test_lacks_an_environment():
    pytest.skip("no server")
"""
CONFTEST = """
def pytest_collection_modifyitems(items):
    for item in items:
        item.user_properties += [("fault", marker.kwargs["number"]) for marker in item.iter_markers("fault")]
"""


def test_every_row_has_a_test():
    text = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py") if path != Path(__file__))
    numbers = {int(number) for number in re.findall(r"mark\.fault\(number=(\d+)\)", text)}
    assert numbers == {fault.number for fault in FAULTS} == set(range(1, 34))


def test_the_matrix_is_that_of_the_documentation():
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[:3] for line in text.splitlines() if re.match(r"\| \d+ \| ", line)]
    assert rows == [[f"| {fault.number}", fault.what, fault.expected] for fault in FAULTS]


@pytest.mark.slow
def test_the_table_says_what_the_tests_gave(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "--junitxml=report.xml", "-W", "ignore", "test_it.py"]
    subprocess.run(words, cwd=tmp_path, timeout=120, check=False, stdout=subprocess.DEVNULL)
    found = outcomes(tmp_path / "report.xml")
    assert (found[2].passed, found[2].word, found[2].figures) == (2, "passed", {"detect_s": 5.0, "steps_lost": 1.0})
    assert found[4].word == "1 of 3 failed" and found[6].word == "not run: an environment is missing"
    assert found[1] == Outcome() and found[1].word == "no test yet"
    rows = table(found, FAULTS[:2]).splitlines()
    assert rows[2].startswith("| 1 | ") and "| no test yet |  |  |  | 0 |" in rows[2]
    assert "| passed | 5 |  | 1 | 2 |" in rows[3]


def test_only_the_table_of_a_page_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n\n| # | fault | x |\n|---|---|---|\n| 1 | old | x |\n\nafter\n")
    replace_table(page, "| # | fault | x |\n|---|---|---|\n| 1 | new | x |\n")
    assert page.read_text() == "before\n\n| # | fault | x |\n|---|---|---|\n| 1 | new | x |\n\nafter\n"
