"""The servers that answer: started here from a model's HF directory, or given by their URLs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_tropd.sglang.api.client import Client
from megatron_tropd.sglang.api.fields import field, items, text
from megatron_tropd.sglang.errors import BadResponse
from megatron_tropd.sglang.loop_thread import LoopThread
from megatron_tropd.sglang.server.fleet import ServerFleet
from megatron_tropd.sglang.server.process import ServerProcess
from megatron_tropd.sglang.server.server import Server
from megatron_tropd.sglang.server_flags import BENCHMARK_FLAGS
from megatron_tropd.sglang.settings import Keys, ServerSettings

_QUESTION_S = 30.0
"""Until a given server must have said which model it serves."""
_CUDA_MEMORY = ("--mem-fraction-static", "0.85")
"""No trainer shares the GPU.  Not run."""
_SPEED_ONLY = frozenset(
    {
        "--chunked-prefill-size",
        "--cuda-graph-bs",
        "--cuda-graph-max-bs",
        "--disable-cuda-graph",
        "--log-level",
        "--log-requests",
        "--max-prefill-tokens",
        "--max-running-requests",
        "--max-total-tokens",
        "--mem-fraction-static",
        "--watchdog-timeout",
    }
)
"""Flags of SGLang that say how much memory and time a response takes.  They may change when a run goes on, for example
because memory ran out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Where to ask."""

    urls: tuple[str, ...]
    model: str
    """What the servers call the model."""
    key: str
    """Of the API; "" for none."""


def server_settings(
    model: Path, *, output: Path, python: Path, num_servers: int, tp_size: int, host: str, keys: Keys | None,
    dtype: Literal["float32", "bfloat16"], flags: Sequence[str], cuda: bool, start_timeout_s: float,
) -> ServerSettings:  # fmt: skip
    """Return the settings of servers for a model's HF directory, checked.

    Raises:
        ValueError: naming the setting and what to change.
    """
    ours = _CUDA_MEMORY if cuda and _CUDA_MEMORY[0] not in {flag.partition("=")[0] for flag in flags} else ()
    return ServerSettings(
        names=BENCHMARK_FLAGS, hf_dir=model, log_dir=output / "servers", dtype=dtype, python=python,
        num_servers=num_servers, tp_size=tp_size, host=host, keys=keys, flags=(*ours, *flags), cuda=cuda,
        speaks_text=True, start_timeout_s=start_timeout_s,
    )  # fmt: skip


def passed_flags(words: Sequence[str]) -> dict[str, list[str]]:
    """Return the flags for SGLang that can change a response, as ``--sglang-X`` -> its values.

    Of a file, as a chat template can be, the value is the digest of its content: it may be moved, and not be changed.

    Args:
        words: ``--X VALUE...`` of all flags.
    """
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            values = found.setdefault(flag, [])
            values += [_content(value)] if equals else []
        else:
            values.append(_content(word))
    return {
        f"{BENCHMARK_FLAGS.prefix}{flag.removeprefix('--')}": given
        for flag, given in found.items()
        if flag not in _SPEED_ONLY
    }


def _content(value: str) -> str:
    # Unlike Path.is_file, this takes a value that is too long for a name.
    return f"sha256:{hashlib.sha256(Path(value).read_bytes()).hexdigest()}" if os.path.isfile(value) else value


@contextlib.contextmanager
def started(settings: ServerSettings, max_positions: int) -> Iterator[Served]:
    """Serve until the block ends.

    Args:
        settings: of the servers.
        max_positions: of the model.

    Raises:
        EngineError: no server could be started, with the end of its log.
    """
    processes = [ServerProcess(settings, index, max_positions) for index in range(settings.num_servers)]
    fleet = ServerFleet(settings, [Server(index, settings, process) for index, process in enumerate(processes)])
    loop = LoopThread("benchmark-servers")
    try:
        loop.run(fleet.start())
        loop.run(fleet.wait_until_up())
        urls = tuple(server.url for server in fleet.servers if server.is_up)
        yield Served(urls=urls, model=str(settings.hf_dir), key=settings.keys.api if settings.keys else "")
    finally:
        loop.run(fleet.close())
        loop.close()


def given(urls: Sequence[str], model: str | None, keys: Keys | None) -> Served:
    """Return servers that run already.

    Args:
        urls: ``http://host:port`` of each.
        model: what they call the model; None: what the first one says.
        keys: of the API; None for none.

    Raises:
        EngineDown, RequestRefused, BadResponse: a server does not answer, refuses the key, or serves no such model.
    """
    served = asyncio.run(_served_models(urls, keys))
    wanted = model or served[0][0]
    for url, names in zip(urls, served, strict=True):
        if wanted not in names:
            raise BadResponse(
                f"--server-urls: {url} serves {', '.join(names)}, not {wanted}; give --served-model, or servers of "
                "one model"
            )
    return Served(urls=tuple(url.rstrip("/") for url in urls), model=wanted, key=keys.api if keys else "")


async def _served_models(urls: Sequence[str], keys: Keys | None) -> list[list[str]]:
    return await asyncio.gather(*(_models_of(url, keys) for url in urls))


async def _models_of(url: str, keys: Keys | None) -> list[str]:
    client = Client(f"--server-urls {url}", url.rstrip("/"), keys)
    try:
        answer = await client.get("/v1/models", timeout_s=_QUESTION_S)
        names = [text(field(entry, "id"), "id") for entry in items(field(answer, "data"), "data")]
        if not names:
            raise BadResponse("it serves no model")
        return names
    except BadResponse as error:
        name = "" if str(error).startswith(client.name) else f"{client.name}: /v1/models: "
        raise BadResponse(f"{name}{error}") from None
    finally:
        await client.close()
