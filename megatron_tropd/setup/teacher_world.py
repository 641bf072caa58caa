"""Build what the ranks of a dedicated teacher run, and tell them what the trainer's end means."""

from __future__ import annotations

from contextlib import suppress

import torch.distributed as dist

from megatron_tropd.parallel.bridge import Bridge
from megatron_tropd.parallel.groups import student_groups
from megatron_tropd.parallel.mailbox import Mailbox
from megatron_tropd.parallel.roles import TRAINER, Job, another_connection
from megatron_tropd.setup.models import make_frozen
from megatron_tropd.setup.run_spec import RunSpec
from megatron_tropd.setup.same_configuration import check_same_configuration
from megatron_tropd.teacher.dedicated.messages import inbox, outbox, stopping_message
from megatron_tropd.teacher.dedicated.worker import Worker


def make_worker(spec: RunSpec, job: Job) -> Worker:
    """Build this rank's part of the teacher.  Collective over the teacher's ranks, which are the world here, and in the
    end over the trainer's too.

    Its layout is Megatron's global one in these processes, as the student's is in the trainer's.
    """
    config, name = spec.config, job.role.name
    check_same_configuration(config, job)
    teacher = next(teacher for teacher in spec.models.teachers if teacher.role == name)
    timeout_s = config.parallel.distributed_timeout_s
    groups = student_groups(teacher.layout, seed=config.training.seed, timeout_s=timeout_s)
    model = make_frozen(spec, teacher.model, groups, "teacher", offload=teacher.config.teacher.teacher_offload)
    leads = dist.get_rank() == 0
    return Worker(
        model,
        Mailbox(inbox(name), lambda: another_connection(timeout_s)) if leads else None,
        Mailbox(outbox(name), lambda: another_connection(timeout_s)) if leads else None,
        Bridge(job, TRAINER, timeout_s=timeout_s),
        first=job.role.first,
    )


def tell_teachers(job: Job, timeout_s: float, why: str) -> None:
    """Tell the ranks of all dedicated teachers what asked the run, which has saved itself, to stop.  On one rank."""
    for role in job.roles:
        if role.name != TRAINER:
            with suppress(dist.DistError):  # without the store the job ends anyhow, and what matters is saved
                Mailbox(inbox(role.name), lambda: another_connection(timeout_s)).post(stopping_message(why))
