"""Stand-in for SGLang's compiled kernels, published for CUDA only.

A plain module, not an inert package: SGLang asks whether submodules and attributes of the real one exist
to choose between kernels and pure torch, so only functions asked for by name get an answer.
"""

from typing import Any

__version__ = "0.4.10"


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"sgl_kernel.{name} was called, but this environment holds only a stand-in (tools/sglang_cpu); "
            "keep to the flags of docs/sglang.md, whose code paths are pure torch"
        )

    missing.__name__ = name
    return missing
