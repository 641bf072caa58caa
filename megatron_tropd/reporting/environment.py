"""Description of what a run ran on, for ``env.json``: code, versions, machine, command line; without secrets."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.reporting.redaction import redact_argv, redact_mapping

PACKAGES = (
    "megatron-tropd",
    "torch",
    "megatron-core",
    "transformers",
    "sglang",
    "transformer-engine",
    "safetensors",
    "numpy",
)
ENV_PREFIXES = ("CUDA_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "OMP_", "NVTE_", "SGLANG_", "SLURM_", "HF_", "MASTER_")
ENV_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def describe_environment() -> dict[str, Any]:
    """The content of ``env.json``, ready for JSON."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": redact_argv(getattr(sys, "orig_argv", sys.argv)),
        "git": git_state(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpu_count": os.cpu_count(),
        "gpus": gpu_names(),
        "environment": _chosen_environment(),
    }


def package_version(name: str) -> str | None:
    """The installed version, without importing the package; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def gpu_names() -> list[str]:
    """The names of the GPUs that this process sees."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def git_state(directory: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the repository that tracks ``directory``; None where none does.

    An installed package may lie inside the repository of something else (a virtual environment in a
    checkout), whose commit says nothing about this code; so the function first checks that
    the repository tracks files here.
    """
    if not _git(directory, "ls-files", "--", "."):
        return None
    return {"sha": _git(directory, "rev-parse", "HEAD"), "dirty": bool(_git(directory, "status", "--porcelain"))}


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _chosen_environment() -> dict[str, str]:
    chosen = {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(ENV_PREFIXES) or name in ENV_NAMES
    }
    return redact_mapping(chosen)
