"""Prepare a run: check its configuration, find its models, build its parts.

    run_spec.py        check a configuration before any process group or model is made
    checks.py, engine_checks.py, model_specs.py, engine_settings.py   the parts of that check
    assemble.py        build the parts of a run from a checked configuration, with models.py, engines.py, run_files.py

The run itself is in ``training/``.
"""
