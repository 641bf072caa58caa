"""From what --prompt-data names to rows: the content of a row is interpreted in ``data/encoding``.

rows.py       a row with its place, and what is wrong with one that cannot be used
sources.py    the data files that a path, a directory, a saved data set or a name on the hub stands for
spans.py      parts of a file that can be read on their own
readers.py    the rows of a span
"""
