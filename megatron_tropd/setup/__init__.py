"""What happens before a run: its configuration is checked, its models are found, its parts are assembled.

    run_spec.py        everything that can be known, and refused, before a process group or a model exists
    checks.py, engine_checks.py, model_specs.py, engine_settings.py   the parts of that check
    assemble.py        from a checked configuration to the parts of a run, with models.py, engines.py, run_files.py

A run itself is the room ``training``.
"""
