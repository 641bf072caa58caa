"""Unpickle plain data only, with memory and time in proportion to the bytes.

A pickle is a program.  Even one that names no function can take 16 GB with nine bytes (an entry of the memo far away),
change a class, or copy one list a million times.  torch and Megatron read these files again by themselves, so what is
accepted here has to be harmless to Python's own unpickler too.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import pickletools
from collections.abc import Callable, Mapping, Sized
from typing import Any

from megatron_tropd.json_files import shown

Globals = Mapping[tuple[str, str], object]
"""(module, name) in a pickle -> what it stands for."""
_OPERATIONS = frozenset(
    [
        "MARK",
        "STOP",
        "POP",
        "POP_MARK",
        "DUP",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "LONG4",
        "BINFLOAT",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "SHORT_BINBYTES",
        "BINBYTES",
        "BINBYTES8",
        "EMPTY_LIST",
        "APPEND",
        "APPENDS",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "EMPTY_DICT",
        "SETITEM",
        "SETITEMS",
        "GET",
        "BINGET",
        "LONG_BINGET",
        "PUT",
        "BINPUT",
        "LONG_BINPUT",
        "MEMOIZE",
        "GLOBAL",
        "STACK_GLOBAL",
        "REDUCE",
        "NEWOBJ",
        "BUILD",
        "BINPERSID",
        "PROTO",
        "FRAME",
    ]
)
_NAMES = {ord(operation.code): operation.name for operation in pickletools.opcodes}


class PickleFault(ValueError):
    """A pickle is damaged, or holds more than plain data."""


class _Operations(dict[int, Callable[[Any], None]]):
    """What each operation does; one that plain data does not need is a fault."""

    def __missing__(self, code: int) -> Callable[[Any], None]:
        name = _NAMES.get(code)
        raise PickleFault(f"it uses {name}, which plain data does not need" if name else f"byte {code} means nothing")


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler in Python, whose memo is a mapping, with fewer operations and with limits."""

    dispatch = _Operations(
        {code: action for code, action in pickle._Unpickler.dispatch.items() if _NAMES[code] in _OPERATIONS}
    )

    def __init__(self, data: bytes, known: Globals, persistent: Callable[[Any], object]) -> None:
        super().__init__(io.BytesIO(data))
        self._known, self._persistent = known, persistent
        self._size = self._left = len(data)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            named = f"{module}.{name}".encode("ascii", errors="backslashreplace").decode()
            raise PickleFault(f"it refers to {named[:200]}, which is not plain data")
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        return self._persistent(pid)

    def spend(self, values: Any) -> None:
        """Count what an operation copies.  Honest files copy once what was read from them."""
        self._left -= sum(len(value) for value in (values, *values) if isinstance(value, Sized))
        if self._left < 0:
            raise PickleFault("it makes more values than it holds")

    def check_place(self, place: int) -> None:
        if not 0 <= place <= self._size:  # the unpickler in C makes a table of that length
            raise PickleFault(f"it numbers a value {shown(place)}, and has only {self._size} bytes")


def _within(name: str) -> Callable[[Any], None]:
    """Return an operation that puts a value into the memo, with a limit for its number."""
    action = pickle._Unpickler.dispatch[getattr(pickle, name)[0]]

    def put(self: Any) -> None:
        action(self)
        self.check_place(next(reversed(self.memo)))

    return put


def _spending(name: str) -> Callable[[Any], None]:
    """Return an operation that calls something with the last value on the stack, within the limit of copies."""
    action = pickle._Unpickler.dispatch[getattr(pickle, name)[0]]

    def call(self: Any) -> None:
        self.spend(self.stack[-1])
        action(self)

    return call


def _build(self: Any) -> None:
    """Set the fields of an object, which has to be a record: a class or a function has fields too."""
    state, target = self.stack[-1], self.stack[-2]
    if not dataclasses.is_dataclass(target) or isinstance(target, type):
        raise PickleFault(f"it sets fields of {shown(target)}, which is no record")
    self.spend(state if isinstance(state, tuple) else (state,))
    pickle._Unpickler.dispatch[pickle.BUILD[0]](self)


for _name in ("PUT", "BINPUT", "LONG_BINPUT"):
    _Unpickler.dispatch[getattr(pickle, _name)[0]] = _within(_name)
for _name in ("REDUCE", "NEWOBJ"):
    _Unpickler.dispatch[getattr(pickle, _name)[0]] = _spending(_name)
_Unpickler.dispatch[pickle.BUILD[0]] = _build


def _nothing_outside(pid: object) -> object:
    raise PickleFault("it refers to data outside of it")


def load_plain(data: bytes, known: Globals, persistent: Callable[[Any], object] = _nothing_outside) -> Any:
    """Return what a pickle holds.

    Args:
        data: the pickle.
        known: what the names in it may stand for; a name that is not there is a fault.
        persistent: returns what a persistent id stands for.

    Raises:
        PickleFault: it is damaged, names something else, or would take more memory than its size justifies.
    """
    unpickler = _Unpickler(data, known, persistent)
    try:
        return unpickler.load()
    except PickleFault:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        raise PickleFault(f"it is no pickle, or a damaged one (read up to {type(error).__name__})") from error
