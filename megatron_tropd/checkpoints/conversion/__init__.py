"""Convert checkpoints as streams of row bands, so that no process holds a whole tensor larger than its buffer.

    hf_to_torch_dist.py   Hugging Face files to a checkpoint
    torch_dist_to_hf.py   a checkpoint to Hugging Face files
    reshard.py            a checkpoint to one that is cut or padded in another way
    verify.py             read what was written again and compare digests
    logits.py             compare the logits of both models
    reading.py            HF tensors of a checkpoint, band by band
    writing.py            one checkpoint file per process, band by band
    workers.py            the processes that share a conversion

Parameters are dealt out to the processes by size.  A process reads the rows of its parameters in order, in bands of at
most the buffer's size, and hashes the bytes.  Each weight is read once, apart from checks before and after the
conversion.  Processes send each other no weights, only records of files and digests.  Peak memory above the
interpreter is one buffer; two where dtypes differ or chunks are cut by columns; three where both are so.
"""

FRONT = {
    "hf_to_torch_dist": ("hf_to_torch_dist",),
    "logits": ("check_logits",),
    "reading": ("check_stored", "open_tensors"),
    "reshard": ("plan_copy", "verify_copy", "write_copy"),
    "torch_dist_to_hf": ("torch_dist_to_hf",),
    "verify": ("verify_hf", "verify_stored"),
    "workers": ("Workers",),
    "writing": ("write_plain_files",),
}
