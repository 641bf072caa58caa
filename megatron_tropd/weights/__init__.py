"""Weights: where every number of a model lies, and how it gets from one place to another.

    coordinates/    what a Megatron rank, an SGLang rank and a checkpoint hold of each Hugging Face tensor
    plan/           who sends which bytes to whom in an update of engines, and the proof that nothing is missing
    transport/      moving bytes between processes: carrying out a plan, or exporting whole tensors
    files/          Hugging Face and torch_dist files

``coordinates`` imports none of the others; ``plan`` and ``files`` import ``coordinates``; ``transport`` imports
``coordinates`` and ``plan``.  ``engine_loader.py`` is what an SGLang server calls; its address is a command-line
argument of servers, so it stays where it is.  The ``FRONT`` of each room lists what others may import from it.
"""
