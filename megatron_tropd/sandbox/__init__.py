"""Runs programs that a model wrote, with limits on time, memory, processes, files and network.

* ``outcome.py``  Limits, Outcome and its verdicts, SandboxError
* ``run.py``  ``run_python``: the files and the process of one run; ``run_many``
* ``watch.py``  reads what the process writes, holds it to its limits, ends it
* ``directory.py``  the directory it may write in
* ``inside/launcher.py``  the first program in the process: confines it, then runs the program
* ``system_calls.py``, ``landlock.py``  what the kernel is told to refuse
* ``machine.py``, ``trial.py``  what this machine can enforce, and ``check``, which tries it
* ``__main__.py``  requests and outcomes as JSON lines

It needs nothing but Python and Linux (x86_64, aarch64): it also runs in the environments of other programs, which have
no torch.  docs/sandbox.md says what it holds against and what it does not.
"""

from megatron_tropd.sandbox.outcome import Limits, Outcome, SandboxError, Verdict
from megatron_tropd.sandbox.run import Request, run_many, run_python
from megatron_tropd.sandbox.trial import check

__all__ = ["Limits", "Outcome", "Request", "SandboxError", "Verdict", "check", "run_many", "run_python"]
