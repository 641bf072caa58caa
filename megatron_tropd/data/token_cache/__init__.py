"""Tokenized rows on disk: made once per data, tokenizer and flags, mapped into memory by every rank.

shard.py       one file of tokenized rows (Arrow), made from one span
finish.py      uids, digest and counts of all shards together
build.py       the shards of a cache, made by all ranks that want it, each shard by one of them
tokens.py      reading rows of a finished cache
"""
