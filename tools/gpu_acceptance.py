"""Proves this package on ONE GPU, in at most 8 minutes: numbers, speed, memory, every path that only a GPU has.

    python tools/gpu_acceptance.py --out runs/acceptance             # one GPU; without one: tiny shapes on the CPU
    python tools/gpu_acceptance.py --only a d                        # some sections
    python tools/gpu_acceptance.py --device cpu --tiny               # every line of every section, as CI runs it

It needs no network and no weights: models have the shapes of Qwen3 and random weights.  Every section runs in a process
of its own and is killed at its deadline; after each the table is written anew, as acceptance.md and acceptance.json in
--out.  The exit code is 0 if every section that ran kept its limits of correctness; a goal of speed that is not reached
is a ``miss`` in the table.  docs/gpu.md says what each section does.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_tropd.flag_parser import FlagParser  # noqa: E402
from tools.acceptance.hardware import sglang  # noqa: E402
from tools.acceptance.runner import environment, run_sections  # noqa: E402
from tools.acceptance.sections import SECTIONS  # noqa: E402
from tools.acceptance.setting import Setting  # noqa: E402
from tools.acceptance.table import MARKDOWN_FILE, markdown  # noqa: E402

DEFAULT_SGLANG = ROOT / ".venv-sglang" / "bin" / "python"
_LOOK_S = 120.0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    letters = [section.letter for section in SECTIONS]
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where torch sees a GPU")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes; always on a CPU")
    parser.add_argument("--only", nargs="+", choices=letters, default=letters, metavar="LETTER", help="sections to run")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "acceptance")
    parser.add_argument("--time-limit", type=float, default=480.0, metavar="SECONDS", help="of everything together")
    parser.add_argument("--sglang-python", help="interpreter of SGLang's environment; default: .venv-sglang/bin/python")
    arguments = parser.parse_args(argv)
    if arguments.time_limit <= 0:
        parser.error(f"--time-limit {arguments.time_limit:g}: expected more than 0 seconds")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {arguments.out} cannot be made: {error}")
    if arguments.sglang_python is not None and not Path(arguments.sglang_python).is_file():
        parser.error(f"--sglang-python {arguments.sglang_python} is no file")
    return arguments


def look(wanted: str) -> dict[str, str]:
    """Return what ``hardware.look`` does, in another process: this one never touches the GPU."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tools.acceptance.hardware", wanted], cwd=ROOT,
        env=environment("cpu" if wanted == "cpu" else "cuda"), stdout=subprocess.PIPE, text=True, timeout=_LOOK_S,
        check=True,
    )  # fmt: skip
    found: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def sglang_interpreter(given: str | None, device: str) -> str:
    """Return the interpreter that the SGLang section uses.  On a CPU its server takes half a minute to start, so there
    it has to be asked for."""
    if given is not None:
        return str(Path(given).absolute())
    return str(DEFAULT_SGLANG) if device == "cuda" and DEFAULT_SGLANG.is_file() else ""


def main(argv: list[str]) -> int:
    """Run the sections; returns the exit code."""
    arguments = parse_arguments(argv)
    began = time.monotonic()
    hardware = look(arguments.device or "auto")
    device = hardware.pop("device")
    if not device:
        print("--device cuda: torch sees no GPU", file=sys.stderr)
        return 2
    setting = Setting(
        device="cuda" if device == "cuda" else "cpu", tiny=arguments.tiny or device == "cpu",
        out=str(arguments.out.absolute()), sglang_python=sglang_interpreter(arguments.sglang_python, device),
    )  # fmt: skip
    hardware["sglang"] = sglang(setting.sglang_python)
    for name, value in hardware.items():
        print(f"{name}: {value}", flush=True)
    results = run_sections(
        [section for section in SECTIONS if section.letter in arguments.only], setting, hardware=hardware,
        command=shlex.join(["python", "tools/gpu_acceptance.py", *argv]), time_limit=arguments.time_limit,
        tell=lambda line: print(line, flush=True), began=began,
    )  # fmt: skip
    print(f"\n{markdown(results)}\n{time.monotonic() - began:.0f} s; wrote {arguments.out / MARKDOWN_FILE}")
    return 0 if results.good else 1


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt  # kills the sections on its way out, as Ctrl-C does


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main(sys.argv[1:]))
