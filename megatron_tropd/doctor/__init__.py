"""The command that looks at a machine before a run: ``python -m megatron_tropd.doctor``.

* ``__main__.py``  flags, the table, JSON, the exit code
* ``examine.py``  all probes of a machine side by side, and all judgements
* ``finding.py``  what one check says; checks that fail
* ``child.py``  programs in a child process, with a deadline
* ``answer.py``  the program that imports torch and the other packages, in a child process
* ``versions.py``  the versions that the tests run with
* ``packages.py``, ``gpus.py``, ``kernels.py``, ``host.py``, ``network.py``, ``sglang.py``, ``sandbox.py``,
  ``variables.py``  a subject each: its facts, ``probe``, which reads them from the machine, and ``judge``, which is
  pure

Only the children import what may be missing or broken, so the command itself needs nothing but Python.
"""
