"""How the servers are run: every setting of the SGLang engines, checked before anything starts."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import yaml

API_KEY_VARIABLE = "TROPD_SGLANG_API_KEY"
ADMIN_KEY_VARIABLE = "TROPD_SGLANG_ADMIN_API_KEY"
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

_OWN_FLAGS: dict[str, str] = {
    "--api-key": f"set {API_KEY_VARIABLE} or the key file",
    "--admin-api-key": f"set {ADMIN_KEY_VARIABLE} or the key file",
    "--config": "give the flags themselves",
    "--host": "use --sglang-host",
    "--port": "free ports are chosen",
    "--model-path": "it is the student's",
    "--model": "it is the student's",
    "--tp-size": "use --sglang-tp-size",
    "--tensor-parallel-size": "use --sglang-tp-size",
    "--tp": "use --sglang-tp-size",
    "--load-format": "weights come from the trainer",
    "--skip-tokenizer-init": "it is always set: only token ids travel",
    "--trust-remote-code": "code of a checkpoint is never run",
    "--enable-deterministic-inference": "it gives all samples of one prompt the same random numbers",
}
"""Server flags that may not be passed through, and what to do instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Secrets of the servers.  They travel by pipe and by HTTP header; no repr, argv or log shows them."""

    api: str = field(repr=False)
    """May generate."""
    admin: str = field(repr=False)
    """May replace the weights."""

    def __post_init__(self) -> None:
        if min(len(self.api), len(self.admin)) < 16 or self.api == self.admin:
            raise ValueError("SGLang's API key and admin API key must differ and have at least 16 characters each")


def load_keys(environ: Mapping[str, str] = os.environ, file: Path | None = None) -> Keys | None:
    """Both keys from the environment, or from a YAML file with ``api-key`` and ``admin-api-key``.

    Returns:
        None where neither source has a key.

    Raises:
        ValueError: one key without the other, a file that other users may read, or too short keys.
    """
    values = {"api-key": environ.get(API_KEY_VARIABLE), "admin-api-key": environ.get(ADMIN_KEY_VARIABLE)}
    if file is not None:
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            raise ValueError(f"{file} holds API keys and may be read by others; run: chmod 600 {file}")
        values = {**values, **yaml.safe_load(file.read_text(encoding="utf-8"))}
    if not any(values.values()):
        return None
    if not all(values.values()):
        raise ValueError(
            f"SGLang needs both keys, the API key and the admin API key: set {API_KEY_VARIABLE} and "
            f"{ADMIN_KEY_VARIABLE}, or api-key and admin-api-key in the key file"
        )
    return Keys(api=str(values["api-key"]), admin=str(values["admin-api-key"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class SGLangSettings:
    """Everything about the engines that does not change during a run.

    Raises:
        ValueError: naming the setting and what to change.
    """

    hf_dir: Path
    """Checkpoint directory of the student; the servers read its config.json only."""
    log_dir: Path
    """Receives one log file per start of a server."""
    dtype: Literal["float32", "bfloat16"]
    """Of the servers' weights and of every tensor that is pushed."""
    python: Path | None = None
    """Interpreter of SGLang's environment (``make sglang-env``); needed unless ``urls`` are given."""
    num_engines: int = 1
    urls: tuple[str, ...] = ()
    """Servers that somebody else starts and restarts; ``num_engines`` is then ignored."""
    host: str = "127.0.0.1"
    keys: Keys | None = None
    tp_size: int = 1
    """GPUs of one server."""
    gpu_ids: tuple[int, ...] = ()
    """The servers' GPUs, ``tp_size`` for each in order; empty: 0, 1, 2, ..."""
    flags: tuple[str, ...] = ()
    """Further arguments of ``sglang.launch_server``, as on its command line."""
    cuda: bool = False
    """Whether the servers run on GPUs."""
    transport: Literal["auto", "shared", "bytes"] = "auto"
    """How buckets of weights travel: shared memory (CUDA: IPC handles) to servers of this host, bytes
    over HTTP to any other.  ``auto`` shares with servers started here."""
    bucket_bytes: int = 512 << 20
    max_concurrent_prompts: int = 64
    """Prompts in flight at one server; the others wait here, for whichever server is free first."""
    start_timeout_s: float = 600.0
    request_timeout_s: float = 600.0
    """Deadline of one prompt's samples, and of one bucket of weights."""
    max_failures: int = 5
    """A server that failed more often than this in one run is given up."""

    def __post_init__(self) -> None:
        for name in ("num_engines", "tp_size", "bucket_bytes", "max_concurrent_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"SGLang {name.replace('_', ' ')} is {getattr(self, name)}; expected at least 1")
        if not self.urls and (self.python is None or not self.python.exists()):
            raise ValueError(
                f"--sglang-python {self.python} does not exist; make the environment with `make sglang-env` "
                "or give the URLs of running servers with --rollout-engine-urls"
            )
        addresses = [urlsplit(url).hostname or "" for url in self.urls] or [self.host]
        if self.keys is None and (public := [a for a in addresses if a not in _LOOPBACK]):
            raise ValueError(
                f"SGLang at {', '.join(public)} can be reached from other machines, and whoever reaches it can replace "
                f"weights and run code: set {API_KEY_VARIABLE} and {ADMIN_KEY_VARIABLE}, or keep to 127.0.0.1"
            )
        if self.gpu_ids and len(self.gpu_ids) != self.num_engines * self.tp_size:
            raise ValueError(f"{len(self.gpu_ids)} GPU ids for {self.num_engines} engines of {self.tp_size} GPUs each")
        for flag in self.flags:
            if reason := _OWN_FLAGS.get(flag.partition("=")[0]):
                raise ValueError(f"{flag.partition('=')[0]} cannot be passed through to SGLang: {reason}")
