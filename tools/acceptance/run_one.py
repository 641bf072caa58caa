"""The process of one section: ``python -m tools.acceptance.run_one LETTER MODULE ROWS``.

It imports everything, then waits for the setting on standard input, so that a section can be made ready while the one
before it runs.  A closed standard input ends it: the command is gone.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import signal
import sys
import traceback
from pathlib import Path

from megatron_tropd.flag_parser import FlagParser
from tools.acceptance.report import Report, reason_of
from tools.acceptance.setting import Setting

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however that happens.  Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main() -> int:
    """Run the section; returns 1 if it raised."""
    flags = FlagParser(description=__doc__)
    flags.add_argument("letter")
    flags.add_argument("module")
    flags.add_argument("rows", type=Path)
    flags.add_argument("--product", action="store_true", help="prepare torch for the product before the import")
    arguments = flags.parse_args()
    end_with_parent()
    faulthandler.enable()
    report = Report(arguments.letter, arguments.rows)
    try:
        if arguments.product:
            from megatron_tropd.parallel import platform

            platform.install()  # before the first import of Megatron
        section = importlib.import_module(arguments.module)
        text = sys.stdin.readline()
        if not text:
            return 0
        section.run(report, Setting.from_json(text))
    except Exception as error:  # of any kind: the table says so, and the other sections run
        traceback.print_exc()
        report.add("the section", "failed", reason=reason_of(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
