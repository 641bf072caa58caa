"""The program of the doctor's children: it imports torch and other packages and prints what it finds, as JSON lines.

``answer.py torch`` describes torch and its GPUs; ``answer.py import NAME=MODULE ...`` imports modules in this order.
Each line is written as soon as it is known, because the next step may end the process.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import warnings
from typing import Any


def _say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def _text(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _torch() -> None:
    import torch

    _say(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        varlen=importlib.util.find_spec("torch.nn.attention.varlen") is not None,
        nccl_built=torch.distributed.is_available() and torch.distributed.is_nccl_available(),
    )
    warnings.simplefilter("ignore")  # init() below says the same as an error
    if torch.cuda.is_available():
        _gpus()
    elif torch.version.cuda:
        try:
            torch.cuda.init()
        except Exception as error:  # no driver, or too old a one; the text is torch's own explanation
            _say(reason=str(error).strip().split("\n")[0])


def _gpus() -> None:
    import torch
    from torch.cuda import nccl

    count = torch.cuda.device_count()
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    _say(gpus=[{"name": p.name, "memory_bytes": p.total_memory, "capability": [p.major, p.minor]} for p in properties])
    _say(arch_list=torch.cuda.get_arch_list())
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    _say(no_peer=[pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)])
    if torch.version.cuda and torch.distributed.is_nccl_available():
        _say(nccl=".".join(map(str, nccl.version())))


def _version(module: str) -> str | None:
    """Return the version that the imported module, or a package around it, says it has."""
    while module:
        if isinstance(version := getattr(sys.modules.get(module), "__version__", None), str):
            return version
        module = module.rpartition(".")[0]
    return None


def _import(module: str) -> None:
    if module.startswith("megatron."):  # without CUDA it can be imported only after this
        from megatron_tropd.parallel import platform

        platform.install()
    importlib.import_module(module)


def main(words: list[str]) -> None:
    """Answer the question of ``words``."""
    if words[0] == "torch":
        _torch()
        return
    for name, _, module in (word.partition("=") for word in words[1:]):
        try:
            _import(module)
            _say(**{name: {"version": _version(module), "error": ""}})
        except Exception as error:  # a package may raise anything when it is imported
            _say(**{name: {"version": None, "error": _text(error)}})


if __name__ == "__main__":
    main(sys.argv[1:])
