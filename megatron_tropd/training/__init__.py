"""The training run.  Read ``loop.py`` first; it calls, in this order,

    batch.py     the rollouts of a step, and their scores
    step.py      one forward and backward pass over an update
    guard.py     whether the loss and the gradient are finite, so that the update may be made
    student.py   the student: gradients, optimizer update, learning-rate schedule

Other modules: ``old_policy.py`` (scores by the student before the first update on a batch), ``rewarding.py``,
``parity.py`` (compares the log-probabilities of engines and trainer), ``diagnostics.py``, ``evaluations.py``,
``checkpointing.py`` (when a run saves), ``token_numbers.py`` (of rollouts that are shown), ``run_logger.py``,
``finish.py``, and ``run.py`` (the parts of a run).
"""
