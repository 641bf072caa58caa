"""The weights of a model: where each element is held, and how it gets from one place to another.

    coordinates/    which part of each Hugging Face tensor a Megatron rank, an SGLang rank and a checkpoint hold
    plan/           which rank sends which bytes to which rank in an update of engines, and the proof of such a plan
    transport/      moving bytes between processes: carrying out a plan, or exporting whole tensors
    files/          Hugging Face and torch_dist files

``coordinates`` imports none of the others; ``plan`` and ``files`` import ``coordinates``; ``transport`` imports
``coordinates`` and ``plan``.  ``engine_loader.py`` is called by SGLang servers, which get its module path as a
command-line argument; it must therefore not be moved.  The ``FRONT`` of each package lists the names that code outside
may import from it.
"""
