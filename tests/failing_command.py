"""The training command on a disk that fails by the rules in FAILING_DISK; run in jobs of a FailingDisk."""

from __future__ import annotations

import os
import sys

from megatron_tropd.train import main
from tests.failing_disk import NAME, failing

if __name__ == "__main__":
    with failing(os.environ[NAME]):
        sys.exit(main())
