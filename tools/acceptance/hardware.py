"""The machine and the versions that a table was made with.  Run as a module, it prints them as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform as machine
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "transformers", "megatron-tropd")
_LOOK_S = 60.0


def output(words: Sequence[str], seconds: float = _LOOK_S) -> str:
    """Return what a command prints, stripped; empty if it does not exist or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def version(package: str) -> str:
    """Return the version of an installed package, or ``absent``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def cpu_name() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), machine.machine())


def driver() -> str:
    """Return the version of the NVIDIA driver."""
    if found := output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]):
        return found.splitlines()[0]
    file = Path("/proc/driver/nvidia/version")
    return file.read_text().splitlines()[0] if file.is_file() else "unknown"


def commit() -> str:
    """Return the commit of this checkout, and whether files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    changed = output([*git, "status", "--porcelain", "--untracked-files=no"])
    found = output([*git, "rev-parse", "--short", "HEAD"])
    return f"{found or 'unknown'}{' with changes' if changed else ''}"


def gpu() -> dict[str, str]:
    """Return what torch says of the first GPU."""
    import torch

    found = torch.cuda.get_device_properties(0)
    free = torch.cuda.mem_get_info()[0] / 2**30
    memory = f"{found.total_memory / 2**30:.1f} GiB ({free:.1f} free), {found.multi_processor_count} multiprocessors"
    number = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    asked = ["nvidia-smi", "-i", number, "--query-gpu=clocks.max.sm,power.limit", "--format=csv,noheader"]
    return {
        "GPU": f"{found.name}, {memory}, compute capability {found.major}.{found.minor}",
        "clock and power limit": output(asked) or "unknown",
        "driver": driver(),
        "CUDA of torch": str(torch.version.cuda),
    }


def look(wanted: str) -> dict[str, str]:
    """Return hardware and versions, by name.

    ``device`` is among them: what was wanted, or for ``auto`` what there is; empty where a wanted GPU is not there.
    """
    device = wanted
    if wanted != "cpu":
        import torch

        there = torch.cuda.is_available()
        device = "cuda" if there else "cpu" if wanted == "auto" else ""
    found = {
        "device": device,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        **(gpu() if device == "cuda" else {"GPU": "none used"}),
    }
    found["CPU"] = f"{cpu_name()}, {os.cpu_count()} cores"
    found["Python"] = machine.python_version()
    found.update((name, version(name)) for name in PACKAGES)
    # Triton compiles a launcher for each kernel with it; without one neither kernels nor torch.compile work.
    found["C compiler"] = next((name for name in ("gcc", "clang", "cc") if shutil.which(name)), "none")
    return found


def sglang(interpreter: str) -> str:
    """Return the version of SGLang in its own environment."""
    asked = "import importlib.metadata as m; print(m.version('sglang'), 'with torch', m.version('torch'))"
    return (output([interpreter, "-c", asked]) if interpreter else "") or "absent"


if __name__ == "__main__":
    print(json.dumps(look(sys.argv[1])))
