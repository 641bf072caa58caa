"""From the content of a row to token ids, or to a Fault whose message says what to change.

row_format.py     which keys are read, limits, and the error about a row
fields.py         the values of a row by (nested) key
conversation.py   chat messages in the shapes that data sets have them
thinking.py       whether the response continues the thinking that the prompt opened
texts.py          the texts of a row: the prompt as the model reads it, and the teacher's response
encode.py         tokens of many rows at one time
"""
