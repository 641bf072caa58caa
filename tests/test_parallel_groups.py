"""Process groups of student and teacher."""

from __future__ import annotations


def _timeouts(seconds):
    """Timeouts (s) of the student's and the teacher's groups that a collective of training runs on."""
    import torch

    from megatron_tropd.parallel.groups import release_groups, student_groups, teacher_groups
    from megatron_tropd.parallel.layout import ParallelLayout

    student = student_groups(ParallelLayout(tp=2), timeout_s=seconds).pg_collection
    teacher = teacher_groups(ParallelLayout(pp=2), timeout_s=seconds).pg_collection
    groups = [student.tp, student.pp, student.dp, student.mp, teacher.tp, teacher.pp, teacher.dp, teacher.mp]
    found = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}
    release_groups()
    return found


def test_every_group_has_the_timeout_that_was_asked_for(ranks):
    assert ranks(2).run(_timeouts, 42.0) == [{42.0}] * 2
