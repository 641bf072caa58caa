"""The whole way of an experiment in small, for ``tools/run_experiment.py``.

world.py   two untrained models with a tokenizer, and data in the forms in which data is published
stages.py  the commands, in their order
"""
