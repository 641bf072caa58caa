"""Conversions as streams of row bands: no process ever holds a tensor, let alone a model.

Parameters are dealt out to the processes by bytes.  A process takes the rows of its parameters in order, one
band of at most the buffer's size at a time, and hashes what goes by; nothing is read twice and nothing is
sent but names and digests.  Peak memory above the interpreter is one buffer, two where dtypes differ or chunks
are cut by columns, three where both.
"""
