"""The miniature study: methods of distillation compared in small worlds, by the training command itself.

``plan`` says what is run, ``worlds`` on what, ``driver`` runs it, ``results`` holds what came out, and ``page`` and
``figures`` show it.  The two commands are in ``examples/miniature_study/``.
"""
