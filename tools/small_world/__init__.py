"""A world small enough for a laptop in which distillation has something to do.

Teacher and student are Qwen3 checkpoints of less than 0.1M parameters that calculate modulo 7 and show
their work.  The teacher is good at it, also after a wrong intermediate result; the student is a smaller
network of the same family whose training was stopped early, so it is weak at the arithmetic itself.
"""
