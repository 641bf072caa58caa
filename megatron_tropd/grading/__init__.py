"""Tells whether a response is right, by the grader that --grader or its row names; docs/grading.md.

answers.py         the part of a response that counts, and the answer in it
mathematics.py     equal as mathematics: what math-verify is asked, and what it is not
choices.py         the letter that a response chooses
constraints.py     the 25 constraints of IFEval; instructions.py reads them from a reference
programs.py        the program in a response, and tests of it in the sandbox
references.py      checks of reference answers before a run
grader.py          Grader: from a response to a verdict
workers.py         processes with a deadline for what may take for ever; worker.py is what they run
rewards.py         reward functions: their argument, the built-in exact_match, loading of others
"""
