"""Runs programs that a model wrote, with limits on time, memory, processes, files and network."""

from megatron_tropd.sandbox.outcome import Limits, Outcome, SandboxError, Verdict
from megatron_tropd.sandbox.run import check, run_python

__all__ = ["Limits", "Outcome", "SandboxError", "Verdict", "check", "run_python"]
