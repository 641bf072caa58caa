"""The sections of ``tools/gpu_acceptance.py``, which prove the package on one GPU, and what runs and reports them.

    sections.py    the sections: letter, title, module, deadline
    runner.py      runs each in a process of its own, within its deadline, and writes the table after each
    run_one.py     that process; report.py is where it puts its rows
    table.py       rows, verdicts, JSON and Markdown
    hardware.py    the machine and the versions
    setting.py     what a section is told

Each section is a module with a function ``run(report, setting)``.  It works on a GPU and on a CPU alike; sizes, dtypes
and transports differ, and what a CPU does not have is a row ``not run`` with the reason.  A section calls what the
product's own commands call, so that it proves these and no copy of them.
"""
