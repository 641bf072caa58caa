"""The faults of the matrix and what is expected of each.  Tests name theirs with ``@pytest.mark.fault(number=N)``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """One row."""

    number: int
    what: str
    expected: str


FAULTS = [
    Fault(1, "SIGKILL for a rank in mid-step", "the job ends; the same command resumes, no step twice or missing"),
    Fault(2, "SIGKILL while a checkpoint is written", "the one before is used; the part that was written is removed"),
    Fault(3, "SIGKILL between the rename of a checkpoint and the tracker", "the one before is used"),
    Fault(4, "SIGTERM, SIGUSR1, stop file, at every phase", "saved within the grace period; resumed bit for bit"),
    Fault(5, "SIGSTOP for a rank; ranks that wait for ever", "a deadline of its own; rank, phase and stacks are named"),
    Fault(
        6,
        "full or broken disk at any file that is written",
        "one clear error, or a warning; the checkpoint before is intact",
    ),
    Fault(7, "flipped bit in a checkpoint", "the file and both digests are named; --fallback-previous goes on"),
    Fault(8, "truncated, missing or empty files of a checkpoint", "the same typed error on every rank; no hang"),
    Fault(9, "code in a checkpoint's pickles", "refused; nothing of it runs"),
    Fault(10, "a checkpoint of another layout", "loads; the same losses to 1e-5"),
    Fault(11, "NaN in the gradient of one rank", "no weight moves on any rank; stop or skip"),
    Fault(12, "infinite gradient on one pipeline stage", "the same"),
    Fault(13, "a bit that flips once during an update", "computed again: transient, and the weights are right"),
    Fault(14, "a learning rate or a model that gives absurd numbers", "no weight moves; the message names the cause"),
    Fault(
        15, "SIGKILL for an SGLang server while it writes", "others take over; it is restarted, with the right weights"
    ),
    Fault(16, "SIGKILL for all servers while they write", "restarted and given the weights, or one error"),
    Fault(17, "503, 429, a silent, slow or stopped server", "asked again within bounds; given up only when silent"),
    Fault(18, "replies that are no JSON, too short, NaN, beyond the vocabulary", "a rollout or an error that names it"),
    Fault(19, "a server that reports another weight version", "nothing it writes is trained on"),
    Fault(20, "an update of weights that breaks off", "the engine serves nothing; the next whole update heals"),
    Fault(21, "the right version, wrong weights", "found by the digests or the probe before anything is written"),
    Fault(22, "a teacher's server that is gone for good", "the rollouts are saved; the same command scores them"),
    Fault(23, "a teacher with more padding rows", "accepted"),
    Fault(24, "a teacher with other tokens", "refused at the start, with the first five ids that differ"),
    Fault(25, "bad prompt files", "one message with lines and counts, or skipped and counted"),
    Fault(26, "a replica without a single rollout", "no hang; the numbers of one rank alone"),
    Fault(27, "a response of one token, one of full length", "every token and label once"),
    Fault(28, "two jobs in one run directory", "the second is refused; a dead job's lock is taken over"),
    Fault(29, "mistakes in flags and YAML", "all in one message, exit code 2"),
    Fault(
        30,
        "a reader that went away, a read-only directory, no locks, Ctrl-C twice, no network",
        "degraded, or one error",
    ),
    Fault(31, "servers without keys, wrong keys, open addresses", "refused; keys are shown nowhere"),
    Fault(32, "attacks by a program that a model wrote", "contained within five seconds"),
    Fault(33, "a step that is made again from what was saved", "the same loss and gradient, bit for bit"),
]
