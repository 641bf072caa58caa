"""Tells whether a response gives the right answer.

answers.py         finds the answer in a response: the last \\boxed{...}, or the last match of --answer-pattern
grader.py          compares it with the reference, as text or as mathematics (--grader)
math_process.py    asks a process of its own whether two answers are mathematically equal
math_worker.py     that process: math-verify within bounds of CPU time and memory
rewards.py         reward functions: their argument, the built-in exact_match, loading of others
"""
