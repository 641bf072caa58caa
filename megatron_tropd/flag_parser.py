"""The parser of every command's flags."""

from __future__ import annotations

import argparse
from typing import Any


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that takes flags by their whole names only.

    argparse would take ``--api-k`` for ``--api-key``.  What looks at a command line by names (redaction of secrets,
    flags that are passed on or refused) would not know such a flag for what it is.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)
