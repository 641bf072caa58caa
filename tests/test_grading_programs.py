"""Programs in responses and tests of them: hand-made cases, most of them run in the sandbox."""

from __future__ import annotations

import json
import time

import pytest

from megatron_tropd import sandbox
from megatron_tropd.grading import programs
from megatron_tropd.grading.grader import Question, make_grader
from megatron_tropd.grading.programs import same_output
from megatron_tropd.grading.references import check_references
from megatron_tropd.grading.workers import GradingError
from megatron_tropd.sandbox import SandboxError
from tests.grading_cases.programs import BAD, BLOCKS, OUTPUTS, PROGRAMS, SUM, call, stdin

CODE = make_grader("code")


def test_there_are_enough_cases():
    assert len(BLOCKS) + len(OUTPUTS) >= 50 and len(PROGRAMS) >= 40


@pytest.mark.parametrize(("response", "program"), BLOCKS, ids=range(len(BLOCKS)))
def test_the_last_closed_block_of_python_counts(response, program):
    found = CODE.answer(response)
    assert (found and found.text) == program
    assert not found or response[found.start :].lstrip().startswith(program.strip()[:1])


@pytest.mark.parametrize(("found", "expected", "same"), OUTPUTS, ids=range(len(OUTPUTS)))
def test_outputs(found, expected, same):
    assert same_output(found, expected) is same


@pytest.mark.slow
def test_programs():
    """All at one time on the workers of this machine; a program that fails is named."""
    questions = [
        Question(response=f"```python\n{program}\n```", finished=True, reference=json.dumps(tests))
        for program, tests, _ in PROGRAMS
    ]
    verdicts = CODE.all_right(questions)
    wrong = [program for (program, _, passes), verdict in zip(PROGRAMS, verdicts, strict=True) if verdict is not passes]
    assert not wrong


@pytest.mark.slow
def test_a_program_that_runs_for_ever_is_ended_and_the_rest_of_its_tests_left_out(monkeypatch):
    monkeypatch.setattr(programs, "LIMITS", sandbox.Limits(cpu_s=0.5, wall_s=120.0))
    runs = []
    run = programs.run_python
    monkeypatch.setattr(programs, "run_python", lambda *args, **kwargs: runs.append(1) or run(*args, **kwargs))
    tests = json.dumps(stdin(*[("1 2", "3")] * 50))
    assert not CODE.right("```python\nwhile True: pass\n```", True, tests)
    assert len(runs) == 1
    assert not CODE.right("```python\nwhile True: pass\n```", True, tests) and len(runs) == 1, "it is remembered"


@pytest.mark.slow
def test_what_is_expected_is_never_in_the_sandbox(monkeypatch):
    sent = []
    run = programs.run_python

    def noted(source, *, stdin, limits):
        sent.append(source + stdin)
        return run(source, stdin=stdin, limits=limits)

    monkeypatch.setattr(programs, "run_python", noted)
    for tests in (stdin(("1", "secret-7")), call("f", ("1", '"secret-7"'))):
        assert CODE.right("```python\ndef f(a): return 'secret' + '-7'\nif __name__ == '__main__': print(f(1))\n```", True, json.dumps(tests))  # fmt: skip
    assert len(sent) == 2 and not any("secret-7" in text for text in sent)


def test_a_machine_without_confinement_runs_nothing(monkeypatch):
    def refuses(*args, **kwargs):
        raise SandboxError("no Landlock")

    monkeypatch.setattr(programs, "run_python", refuses)
    with pytest.raises(GradingError, match="a program was not run: no Landlock"):
        make_grader("code").right("```python\nprint(3)\n```", True, json.dumps(SUM))
    monkeypatch.setattr(sandbox, "check", lambda: ["there is no Landlock"])
    (fault,) = check_references([(7, json.dumps(SUM), "code")], "exact")
    assert (
        "cannot be confined on this machine, so they are not run: there is no Landlock (1 rows, first: uid 7)" in fault
    )


@pytest.mark.parametrize(("reference", "fault"), BAD, ids=range(len(BAD)))
def test_references_that_are_no_tests(reference, fault):
    (found,) = check_references([(3, reference, "code"), (5, json.dumps(SUM), "code")], "exact")
    assert fault in found and found.endswith("(1 rows, first: uid 3)")


@pytest.mark.parametrize(
    "text", ["```" * 10**5, "```python\n" * 10**5, "```" + "a" * 10**6 + "`", "`" * 10**6 + "x`", "\n" * 10**6]
)
def test_long_responses_take_linear_time(text):
    begin = time.process_time()
    assert CODE.answer(text) is None
    assert time.process_time() - begin < 10
