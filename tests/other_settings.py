"""The training command, with another --top-k on every rank but the first."""

from __future__ import annotations

import os
import sys

from megatron_tropd import train

if __name__ == "__main__":
    argv = sys.argv[1:]
    if os.environ["RANK"] != "0":
        argv[argv.index("--top-k") + 1] = os.environ["OTHER_TOP_K"]
    sys.exit(train.main(argv))
