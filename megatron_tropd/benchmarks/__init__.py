"""Benchmarks of the paper, run by evalscope in an environment of its own: ``python -m megatron_tropd.benchmark``.

* ``protocol.py``  the seven benchmarks, and how they are asked and graded
* ``data_files.py``  local files of questions in their published formats, checked before anything starts
* ``code_tests.py``  LiveCodeBench's tests, read without unpickling
* ``flags.py``, ``run.py``  the command's flags, and the run from checks to tables
* ``model_source.py``, ``serving.py``  the HF directory of the model, and the servers that serve it
* ``job.py``  the runner's process: its job goes in, its progress comes out
* ``runner/``  what runs in evalscope's environment; imports evalscope, the standard library, the sandbox
* ``results.py``, ``statistics.py``  scores by question, means with standard errors, paired bootstrap
* ``tables.py``, ``paper_results.py``  tables as text and Markdown, beside the paper's numbers

The first three and the runner are also imported in evalscope's environment, which has no torch.
"""
