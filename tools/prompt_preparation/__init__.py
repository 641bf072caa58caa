"""Published data as the project's own rows: the parts of tools/prepare_prompts.py.

flags.py           the command line, as Settings
settings.py        everything that decides what is written
sources.py         the files that are read, and what is recorded of them
layouts/           from a row of a published data set to a Draft
drafts.py          a row on its way, and why one is left out
texts.py           normalised texts, their words, and the key of a prompt
wrappers.py        fixed sentences around the question of a prompt
lengths.py         prompts and responses in tokens or characters
benchmarks.py      the questions that prompts must not hold
repeats.py         prompts that come again, with the same answer or with another
first_pass.py      every row read once: kept in a spool, or left out with a reason
selection.py       which rows of the spool are written
writing.py         the spool, the shards, and an output that appears whole or not at all
tally.py           what was left out and why
report.py          report.json, the data set card and the printed table
preparation.py     one run, from settings to report
"""
