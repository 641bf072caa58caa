"""All settings of SGLang servers, checked before anything starts."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from megatron_tropd.plain_yaml import PlainYamlError, Word, read_plain_yaml
from megatron_tropd.sglang.server_flags import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, ENGINE_FLAGS, ServerFlags

REQUEST_TIMEOUT_FLAG, START_TIMEOUT_FLAG = "--sglang-request-timeout", "--sglang-start-timeout"
"""The flags of ``request_timeout_s`` and ``start_timeout_s``, for messages."""
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    return host in _LOOPBACK


def host_of(url: str) -> str:
    """Return the host of ``url``; "" where it is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Secrets of the servers.  They are sent by pipe and by HTTP header; no repr, argv or log shows them."""

    api: str = field(repr=False)
    """May generate."""
    admin: str = field(repr=False)
    """May replace the weights."""

    def __post_init__(self) -> None:
        if min(len(self.api), len(self.admin)) < 16 or self.api == self.admin:
            raise ValueError("SGLang's API key and admin API key must differ and have at least 16 characters each")


def load_keys(environ: Mapping[str, str] = os.environ, file: Path | None = None) -> Keys | None:
    """Return both keys, from a YAML file with ``api-key`` and ``admin-api-key``, or else from the environment.

    Returns:
        None where neither source has a key.

    Raises:
        ValueError: a file that cannot be read or that other users may read; one key without the other, equal or too
            short keys.
    """
    values = {"api-key": environ.get(API_KEY_VARIABLE), "admin-api-key": environ.get(ADMIN_KEY_VARIABLE)}
    if file is not None:
        values |= _keys_of_file(file)
    if not any(values.values()):
        return None
    if not all(values.values()):
        raise ValueError(
            f"SGLang needs both keys, the API key and the admin API key: set {API_KEY_VARIABLE} and "
            f"{ADMIN_KEY_VARIABLE}, or api-key and admin-api-key in the key file"
        )
    return Keys(api=str(values["api-key"]), admin=str(values["admin-api-key"]))


def _keys_of_file(file: Path) -> dict[str, str]:
    """Return what --sglang-key-file holds.  Messages do not quote the keys."""
    try:
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            raise ValueError(f"{file} holds API keys and may be read by others; run: chmod 600 {file}")
        settings = read_plain_yaml(file)
    except (PlainYamlError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"--sglang-key-file {file}: {reason}") from None
    for name, value in settings.items():
        if name not in ("api-key", "admin-api-key") or not isinstance(value, Word):
            raise ValueError(f"--sglang-key-file {file}: {name[:80]}: expected api-key and admin-api-key, a word each")
    return {name: value.text for name, value in settings.items() if isinstance(value, Word) and not value.is_null}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of the servers of one use, constant during a run.

    Raises:
        ValueError: naming the setting and what to change.
    """

    names: ServerFlags
    """The flags that these settings come from."""
    hf_dir: Path
    """Checkpoint directory of the model."""
    log_dir: Path
    """Receives one log file per start of a server."""
    dtype: Literal["float32", "bfloat16"]
    """Of the servers' weights."""
    python: Path | None = None
    """Interpreter of SGLang's environment (``make sglang-env``); needed unless ``urls`` are given."""
    num_servers: int = 1
    num_nodes: int = 1
    """Machines that the servers are spread over, equally many on each."""
    urls: tuple[str, ...] = ()
    """Servers that are started and restarted elsewhere; ``num_servers`` is then ignored."""
    router_url: str = ""
    """What stands before the servers of ``urls`` and chooses one for every request; empty: nothing does."""
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
    speaks_text: bool = False
    """Whether requests are chat messages, for which a server needs its tokenizer; else only token ids travel."""
    start_timeout_s: float = 240.0
    request_timeout_s: float = 300.0
    """Silence (no work of its scheduler) after which a server that writes or scores counts as down, and the deadline of
    one control call and of one message of weights, whose work is bounded."""
    max_failures: int = 5
    """A server that failed more often than this is given up; a row of successes forgets its failures
    (server/fleet.py)."""

    def __post_init__(self) -> None:
        self._check_counts("num_servers", "tp_size")
        if not self.urls and (self.python is None or not os.path.exists(self.python)):
            raise ValueError(
                f"--sglang-python {self.python} does not exist; make the environment with `make sglang-env` "
                f"or give the URLs of running servers with {self.names.urls}"
            )
        for url in self.urls:
            self._check_url(self.names.urls, url)
        if self.router_url:
            self._check_router()
        addresses = [host_of(url) for url in (*self.urls, self.router_url) if url] or [self.host]
        if self.keys is None and (public := [a for a in addresses if not is_loopback(a)]):
            raise ValueError(
                f"SGLang at {', '.join(public)} can be reached from other machines, where anyone could replace "
                f"weights and run code: set {API_KEY_VARIABLE} and {ADMIN_KEY_VARIABLE}, or keep to 127.0.0.1"
            )
        if self.gpu_ids and len(self.gpu_ids) != self.per_node * self.tp_size:
            raise ValueError(
                f"{len(self.gpu_ids)} GPU ids ({self.names.gpu_ids}) for {self.per_node} {self.names.what}s "
                f"({self.names.number}) of {self.tp_size} GPUs each ({self.names.tp_size})"
            )
        for flag in self.flags:
            if reason := self.names.refusal(flag):
                raise ValueError(
                    f"{self.names.prefix}{flag.partition('=')[0].removeprefix('--')}: {flag.partition('=')[0]} cannot "
                    f"be passed through to SGLang: {reason}"
                )

    def _check_counts(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"SGLang {name.replace('_', ' ')} is {getattr(self, name)}; expected at least 1")

    def _check_router(self) -> None:
        self._check_url(self.names.router, self.router_url)
        if not self.urls:
            raise ValueError(
                f"{self.names.router} {self.router_url} needs {self.names.urls}: a router takes requests only; health, "
                "loads and weights are asked of, and sent to, the servers behind it"
            )
        if self.router_url.rstrip("/") in (url.rstrip("/") for url in self.urls):
            raise ValueError(
                f"{self.names.router} {self.router_url} is in {self.names.urls} too, which are the servers behind it"
            )

    def _check_url(self, flag: str, url: str) -> None:
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port and parts.path in ("", "/")
        except ValueError:  # a port that is no number
            good = False
        if not good:
            raise ValueError(f"{flag} {url}: expected http://host:port")

    @property
    def weight_arguments(self) -> dict[str, str | None]:
        """Arguments of ``sglang.launch_server`` that say where weights come from: the files of ``hf_dir``."""
        return {"--load-format": "auto"}

    @property
    def per_node(self) -> int:
        """Servers of one machine."""
        return self.num_servers // self.num_nodes

    def node_of(self, index: int) -> int:
        """Machine of server number ``index``; 0 is that of rank 0."""
        return index // self.per_node

    def gpus_of(self, index: int) -> tuple[int, ...]:
        """GPUs of server number ``index``, numbered as processes on its machine see them."""
        gpus = self.gpu_ids or tuple(range(self.per_node * self.tp_size))
        first = index % self.per_node * self.tp_size
        return gpus[first : first + self.tp_size]

    def hides_gpus(self, index: int) -> bool:
        """Whether server ``index`` sees its own GPUs only, which --base-gpu-id cannot name because they do not follow
        one another.  It then cannot open a handle of the trainer's GPU."""
        mine = self.gpus_of(index)
        return mine != tuple(range(mine[0], mine[0] + len(mine)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SGLangSettings(ServerSettings):
    """Settings of the rollout engines, whose weights the trainer pushes.  Of ``hf_dir``, the student's, they read
    config.json only; ``dtype`` is that of every tensor that is pushed."""

    names: ServerFlags = ENGINE_FLAGS
    weight_loader: str = ""
    """Module path of the function that a planned transport has the servers' workers call; empty: none."""
    release_memory: bool = False
    """Whether the servers free their memory while the trainer trains."""
    transport: Literal["auto", "shared", "bytes"] = "auto"
    """How buckets of weights travel: shared memory (CUDA: IPC handles) to servers of this host, bytes
    over HTTP to any other.  ``auto`` shares with servers started here that see the trainer's GPU."""
    bucket_bytes: int = 512 << 20
    max_concurrent_prompts: int = 64
    """Prompts in flight at one server; the others wait here, for whichever server is free first."""

    def __post_init__(self) -> None:
        ServerSettings.__post_init__(self)  # super() does not work in a class with slots
        self._check_counts("bucket_bytes", "max_concurrent_prompts")
        if self.transport == "shared" and self.cuda and any(self.hides_gpus(i) for i in range(self.num_servers)):
            raise ValueError(
                f"--rollout-gpu-ids {' '.join(map(str, self.gpu_ids))}: an engine's GPUs do not follow one another, "
                "so it sees no others and cannot open the trainer's memory; use --update-weight-transport bytes"
            )

    @property
    def weight_arguments(self) -> dict[str, str | None]:
        """None are loaded: the trainer pushes them."""
        loader: dict[str, str | None] = {"--custom-weight-loader": self.weight_loader} if self.weight_loader else {}
        saver: dict[str, str | None] = {"--enable-memory-saver": None} if self.cuda and self.release_memory else {}
        return {"--load-format": "dummy", **loader, **saver}
