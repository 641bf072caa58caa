"""Convert checkpoints as streams of row bands, so that no process holds a whole tensor larger than its buffer.

Parameters are dealt out to the processes by size.  A process reads the rows of its parameters in order, in bands of at
most the buffer's size, and hashes the bytes.  Each weight is read once, apart from checks before and after the
conversion.  Processes send each other no weights, only records of files and digests.  Peak memory above the
interpreter is one buffer; two where dtypes differ or chunks are cut by columns; three where both are so.
"""
