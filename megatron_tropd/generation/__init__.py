"""Responses of a model to prompts, for the command ``megatron_tropd.generate``.

prompts.py     the prompts of the data, in order, each with its row and its tokens
writers.py     who writes: the embedded engine, or SGLang servers (servers.py)
store.py       the responses on disk: a journal for each shard that is being written (journal.py), Parquet when it is
               whole (parquet.py)
settings.py    what decides the responses, so that a resumed command goes on with the same
progress.py    what is shown meanwhile
"""
