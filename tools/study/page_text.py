"""What the page of the study says that does not come from its results.  It has no result: those are computed."""

from __future__ import annotations

ABOUT = """\
Methods of on-policy distillation, compared in worlds that fit a laptop, by the training command of this repository
(`python -m megatron_tropd.train`: Megatron-core, the real objectives, the embedded engine). The task is chain
arithmetic modulo 7 with the steps written out; teacher and student are Qwen3 networks of less than 0.1 million
parameters with a vocabulary of 36 words. Every seed trains a teacher and a student anew and then runs every method
from that student, with the same optimizer, batches and settings: AdamW(0.9, 0.999), learning rate 1e-3 and 100
steps unless another is named, 16 prompts with 4 rollouts a step, k = 4, tau = -2. **Nothing was tuned for one
method.** Answers to 512 held-out prompts are compared exactly, with greedy decoding, with top-p 0.7 and at
temperature 1 (two responses each where tokens are drawn).

This says how the methods behave where everything can be repeated. It says nothing about the accuracy of large
language models, for which nothing was run."""

RULE = """\
A comparison takes the difference of two methods in every seed and its 95% confidence interval (paired t test). A
claim **holds** if the interval lies above 0 and so does every seed, it **does not hold** if both lie below, and
else it **cannot be told** from these runs. A claim of several comparisons holds if all hold, and does not hold if
one does not; the one that speaks least for it is shown. Behind the verdict: mean difference [interval], seeds above
0 of all. The verdicts are computed by this rule. There are {comparisons} comparisons and no correction for their
number, so some verdicts are chance."""

AFTER_CLAIMS = """\
The verdicts stand in the order top-p 0.7 / greedy / temperature 1: yes is "holds", no is "does not hold", ? is
"cannot be told". The numbers behind them follow. The paper judges its models with top-p 0.7, as reports of its code
say. Its absolute gains, its responses of thousands of tokens, several domains at once and the combination with AOPD
cannot be tested at this size."""

WORLD_TEXT = {
    "B4": "The quickstart's world: the student is smaller, of the same family and stopped early; the teacher has seen "
    "wrong results in its lessons and goes on from what is written.",
    "H4": "The student's lessons have words without meaning (after 40% of the steps). The teacher has seen such words, "
    "as context only, and would not write them.",
    "H4f": "The student of H4 with the teacher of B4, which has never seen such a word: it is fragile where the "
    "student leads it.",
}

DECODING_NAMES = {"top_p_0.7": "top-p 0.7", "greedy": "greedy", "temperature_1": "temperature 1"}

LIMITS = """\
- The worlds were designed after a first study had failed to show any advantage of TrOPD, and many configurations
  were looked at on the way. That a method gains in B4 or H4 shows that such worlds exist; it is no estimate for
  language models.
- Students are stopped early, inside a steep phase of their learning, and teachers and students differ between
  seeds; few seeds say more about signs than about sizes.
- H4 and H4f have the same students and problems. Their teachers differ in the fillers of their lessons and so in
  everything that a training run makes of them.
- Responses have about 30 tokens and the vocabulary 36; the learning rate is large beside the paper's 5e-6. Neither
  tau nor the beta of the JSD nor the weight of the prefix was varied. Batch size, warm-up, long responses and stop
  tokens that differ between the models were not tested.
- The prefix of the guided methods replaces tokens that the student would have written: at equal steps they learn
  from fewer tokens of their own."""

MAKE = """\
```bash
python examples/miniature_study/run.py --subset    # two seeds of five methods
python examples/miniature_study/run.py             # everything; the same command goes on where it ended
python examples/miniature_study/report.py --results runs/miniature_study/results.jsonl
```

A network is made once for all methods of its seed. `run.py` writes one line for every finished run to
`runs/miniature_study/results.jsonl`; `report.py` reads `examples/miniature_study/results.jsonl` unless told
otherwise. On another machine the last digits of a number differ, which can change the token that is sampled, so
expect other accuracies within the errors. `run.py --warning-world` adds a world that is no part of the study, U: a
noisy student that knows the task, and a teacher that has seen only its own style. There TrOPD was behind OPD in a
preliminary study."""

COLUMNS = """\
Mean over the seeds in percent, with its standard error in parentheses. Behind it the paired difference to OPD in
points with its 95% interval, and in how many seeds it is above 0. Trusted is the share of tokens that the paper's
gate trusts (the method's own, where it has one), in the first and in the last steps; entropy is that of the last
steps; the gradient norm is the mean over the run."""
