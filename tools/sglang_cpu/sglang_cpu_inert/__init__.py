"""Packages that SGLang imports everywhere and never calls on a CPU.

``install("triton", version)`` turns the calling package into one whose every attribute and submodule
exists: a name that begins with a capital is a class (so that it can be subclassed, annotated and asked
for with isinstance), any other is a :class:`Placeholder`.  Decorators of kernels work, because they run at
import time; the kernel that comes out, like everything else here, raises NotImplementedError as soon as it
is used.

With SGLANG_CPU_FORK=1 in its environment a server forks its workers where SGLang would spawn them.  On a CPU that is
safe, and spawned ones import everything again, which is half of the CPU time of a start.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any, NoReturn

_CALLED_AT_IMPORT = frozenset({"jit", "autotune", "heuristics", "constexpr"})
"""Decorators of kernels, and the marker of their constants."""


def _refuse(name: str) -> NoReturn:
    raise NotImplementedError(
        f"{name} was called, but this environment holds only a stand-in for {name.split('.')[0]} "
        "(tools/sglang_cpu); keep to the flags of docs/sglang.md, whose code paths are pure torch"
    )


class _InertClass(type):
    """A class that answers class attributes and refuses to be instantiated (its subclasses too)."""

    def __getattr__(cls, name: str) -> Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder(f"{cls.__module__}.{cls.__name__}.{name}")

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(f"{cls.__module__}.{cls.__name__}")


class Placeholder(ModuleType):
    """Anything with a lower-case name: module, function or decorator."""

    def __init__(self, name: str) -> None:
        super().__init__(name, __doc__)
        self.__path__: list[str] = []
        self.__spec__ = ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        if name[0].isupper():
            value: Any = _InertClass(name, (), {"__module__": self.__name__})
        else:
            value = Placeholder(full)
            sys.modules.setdefault(full, value)
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Decorate a kernel (``@jit``, ``@autotune(configs=...)``); every other call is refused."""
        if self.__name__.rpartition(".")[2] not in _CALLED_AT_IMPORT:
            _refuse(self.__name__)
        if len(args) == 1 and not kwargs and isinstance(args[0], FunctionType | Kernel):
            return Kernel(f"{args[0].__module__}.{args[0].__qualname__}")
        return self

    def __getitem__(self, key: Any) -> NoReturn:
        _refuse(self.__name__)


class Kernel:
    """A function that was meant for the GPU."""

    def __init__(self, name: str) -> None:
        self.__module__, _, self.__qualname__ = name.rpartition(".")
        self.__name__ = self.__qualname__

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse."""
        _refuse(f"kernel {self.__module__}.{self.__name__}")

    def __getitem__(self, grid: Any) -> NoReturn:
        self()


class _Finder(MetaPathFinder, Loader):
    """Finds every submodule of one package."""

    def __init__(self, package: str) -> None:
        self._prefix = package + "."

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith(self._prefix) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Placeholder(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: placeholders answer every attribute."""


def install(package: str, version: str) -> None:
    """Make the module that calls this answer every name."""
    module = sys.modules[package]
    module.__class__ = Placeholder
    module.__version__ = version
    module.__path__ = []
    sys.meta_path.insert(0, _Finder(package))


def fork_workers() -> None:
    """Have SGLang's choice of a start method, which comes when everything is imported, be "fork"."""
    choose = multiprocessing.set_start_method
    multiprocessing.set_start_method = lambda method, force=False: choose("fork", force=force)


if os.environ.get("SGLANG_CPU_FORK") == "1":
    fork_workers()
