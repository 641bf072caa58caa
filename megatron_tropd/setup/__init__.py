"""Prepare a run: check its configuration, find its models, build its parts.

    run_spec.py        check a configuration before any process group or model is made
    checks.py, engine_checks.py, model_specs.py, engine_settings.py   the parts of that check
    objective.py       the objective of the flags, with what its metrics get from the teachers
    same_run.py        compare the run with the checkpoint it resumes from, with model_digests.py
    model_health.py    check what the teacher and the reference compute
    assemble.py        build the parts of a run from a checked configuration, with models.py, engines.py, run_files.py

The run itself is in ``training/``.
"""
