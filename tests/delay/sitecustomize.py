"""For tests, in PYTHONPATH: local rank DELAYED_RANK goes no further than Python's start, until torchrun ends it."""

import os
import signal

if "DELAYED_RANK" in os.environ and os.environ.get("LOCAL_RANK") == os.environ["DELAYED_RANK"]:
    while True:
        signal.pause()
