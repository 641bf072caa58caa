"""From a row of a published data set to a Draft: one file for each form of data.

layout.py          what a form is: its columns, and how a row is read
choose.py          which form the files have; LAYOUTS is the registry
conversations.py   messages and plain values, as every form has them
references.py      answers in the forms that graders read
openthoughts3.py   conversations with a teacher's turn, by domain
rl.py              rows of verl: DAPO-Math, Skywork-OR1
nemotron_sft.py    rows for supervised finetuning
nemotron_rl.py     rows of NeMo Gym
rows.py            the project's own rows, and any data set by the names of its columns
"""
