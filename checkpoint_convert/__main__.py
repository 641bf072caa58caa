"""Run any conversion: ``tropd-convert COMMAND ...``, or ``python -m checkpoint_convert COMMAND ...``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from megatron_tropd.parallel.print_once import Importance, print_once

USAGE_ERROR = 2
COMMANDS = {
    "hf-to-megatron": ("hf_to_megatron", "convert", "Hugging Face weights to a Megatron checkpoint"),
    "megatron-to-hf": (
        "megatron_to_hf",
        "convert",
        "a Megatron checkpoint to Hugging Face files",
    ),
    "megatron-to-megatron": ("megatron_to_megatron", "convert", "a Megatron checkpoint split or padded in another way"),
    "inspect": ("inspect", "inspect", "what a checkpoint directory holds"),
}
"""Command -> (module, function, description for --help)."""


def usage() -> str:
    """Return the text of ``--help``."""
    lines = ["usage: tropd-convert COMMAND [flags]", "", "commands (each has a --help of its own):"]
    lines += [f"  {name:<22}{text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names, and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["-h"], ["--help"]):
        print_once(usage(), Importance.CAUSE, sys.stdout)
        return 0
    if not words or words[0] not in COMMANDS:
        given = f"unknown command {words[0]!r}" if words else "no command was given"
        print_once(f"error: {given}; choose one of {', '.join(COMMANDS)} (tropd-convert --help)", Importance.CAUSE)
        return USAGE_ERROR
    from checkpoint_convert import common  # torch is imported only when there is something to convert

    module, function, _ = COMMANDS[words[0]]
    return common.run(getattr(importlib.import_module(f"checkpoint_convert.{module}"), function), words[1:])


if __name__ == "__main__":
    sys.exit(main())
