"""Plan a run before it is started: memory, seconds and idle time by counting.  ``tools/plan_run.py`` is the command.

    hardware.py     GPUs by name, and what share of their peaks a program reaches
    lengths.py      how long responses are, when only their mean and their limit are known
    parameters.py   parameters of a rank, and the bytes of weights, gradients and optimizer state
    activations.py  what a layer keeps from forward to backward, and what a forward pass alone needs
    caches.py       bytes of the vocabulary head, of a KV cache and of scores on their way
    scenario.py     a checked configuration with the machines that it is planned for
    memory.py       bytes of every kind of rank, by phase
    generation.py   seconds of an engine that writes, and when its rollouts are finished
    seconds.py      seconds of every phase and of a step, and what is idle
    advice.py       what does not fit, and which flags change that
    report.py       the plan as text and as JSON
    table.py        the rows of docs/scaling.md

Only scenario.py reads files; the other modules are arithmetic, without tensors and process groups.  FLOPs are counted
by ``tools/acceptance/flops.py``.
"""
