"""The run itself.  Read ``loop.py`` first; it calls, in this order,

    batch.py     the rollouts of a step, and everything that is known about them
    step.py      one forward and backward pass over an update
    guard.py     whether the update may be made
    student.py   the model that learns: gradients, update, schedule

Beside them: ``old_policy.py`` (the student before the first update on a batch), ``rewarding.py``, ``parity.py`` (do the
engines write with the weights that were trained?), ``diagnostics.py``, ``evaluations.py``, ``checkpointing.py`` (when
a run saves), ``run_logger.py``, ``finish.py``, and ``run.py``, the parts of a run by name.
"""
