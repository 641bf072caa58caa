"""Waiting for what another process, thread or server does."""

import time

EVERY_S = 0.005  # how often it is looked at


def wait_for(condition, job=None, timeout: float = 120.0):
    """What ``condition()`` gives once it holds, within ``timeout`` seconds and while ``job`` (if one is named) runs.

    The other side makes, renames and deletes files meanwhile: one that is not there (yet, or since it was listed)
    says "not yet".
    """
    deadline = time.monotonic() + timeout
    missing = None
    while time.monotonic() < deadline and (job is None or job.poll() is None):
        try:
            if found := condition():
                return found
        except FileNotFoundError as error:
            missing = error
        time.sleep(EVERY_S)
    why = f"within {timeout:g} s" if job is None else f"within {timeout:g} s (exit code of the job: {job.poll()})"
    raise AssertionError(f"what was waited for did not happen {why}; a missing file: {missing}")
