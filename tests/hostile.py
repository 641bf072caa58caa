"""Files and values as an attacker or a broken disk makes them, from a seed; and a count of how they are taken.

:class:`Mutator` makes the inputs.  :class:`Trial` gives each to the code under test and holds it to four rules: what is
raised is one of the named types exactly (no subclass that Python itself raised), its text names what it is about, the
call ends within :data:`CPU_SECONDS`, and memory does not grow by more than :data:`MAX_GROWTH`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import resource
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

CPU_SECONDS = 10.0
MAX_GROWTH = 300 << 20
"""Bytes of memory above what the process has before the first input; no input has more than a few kilobytes."""
PYTHONS_OWN = ("Error(", "Traceback", "NoneType", "has no attribute", "unhashable", "not subscriptable", "not iterable",
               "unsupported operand", "positional argument", "object is not")  # fmt: skip
"""Words that an error of Python brings into a message that wraps it."""


class Raw:
    """A piece of JSON that ``json.dumps`` would not write."""

    def __init__(self, text: str) -> None:
        self.text = text


_RAW = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "9" * 400, "-" + "9" * 400, "9" * 5000, *("[" * depth + "]" * depth for depth in (60, 300, 900, 960, 980)),
    "[" * 20_000 + "]" * 20_000, '{"a":' * 20_000 + "1" + "}" * 20_000, '{"a": 1, "a": 2}', "-0", "1E2", "01", "'x'", "", "tru",
    '"\\ud800"', '"\\u0000"', '"\\x"', "1.0", "2.0",
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 255, 2**31, 2**32 + 1, 2**63, 2**64, -(2**63) - 1, 10**30, 0.0, 0.5, 1.0, -1.5, 1e30, 1e308,
    1e-320, "", " ", "0", "1", "x", "null", "true", "nan", "../x", "../../etc/passwd", "/etc/passwd", "a/b", "a\\b", ".", "..",
    "a\0b", "\ud800", "\ufeff", "\u202e", "\u00e9", "%s", "{0}", "\x1b[2J", "x" * 300, "x" * 5000, [], {}, [None], [[]], [1], ["x"],
    [1, 2, 3, 4, 5], [True], [-1], [0.5], [1e30], {"a": 1}, {"": None}, {"a": {"b": []}}, [{"a": 1}], *map(Raw, _RAW),
]  # fmt: skip


class Mutator:
    """Random changes, the same for the same seed."""

    def __init__(self, seed: int | str, odd: list[Any] | None = None, *, deep: bool = True) -> None:
        self.draw = Random(seed)
        usual = [value for value in ODD if deep or not isinstance(value, Raw) or len(value.text) < 1000]
        self._odd = [*usual, *(odd or [])]

    def json(self, value: Any, *, damaged: float = 0.15) -> bytes:
        """The JSON of ``value`` after one to three changes of its structure, or with its bytes damaged."""
        if self.draw.random() < damaged:
            return self.bytes(json.dumps(value).encode())
        return dump(self.structure(value))

    def structure(self, value: Any) -> Any:
        """``value`` with one to three changes at random places."""
        changed = [copy.deepcopy(value)]  # so that the whole value can be replaced too
        for _ in range(self.draw.choice([1, 1, 1, 2, 3])):
            self._change(changed)
        return changed[0]

    def odd(self) -> Any:
        """A value that is unlikely to be expected."""
        return copy.deepcopy(self.draw.choice(self._odd))

    def _change(self, root: list[Any]) -> None:
        places = list(_places(root))
        parent, key = self.draw.choice(places if self.draw.random() < 0.9 else places[:1])
        kind = self.draw.random()
        if kind < 0.65:
            parent[key] = self.odd()
        elif kind < 0.75 and parent is not root:
            del parent[key]
        elif kind < 0.85:
            other, name = self.draw.choice(places)
            parent[key] = copy.deepcopy(other[name])
        elif kind < 0.93 and isinstance(parent, dict):
            parent[self.draw.choice(["", "x", "\ud800", "a\0b", "../x", "self", "__class__", "x" * 300])] = parent[key]
        elif isinstance(parent[key], list):
            parent[key] = parent[key][:-1] if self.draw.random() < 0.5 else [*parent[key], self.odd()]
        elif isinstance(parent[key], int | float) and not isinstance(parent[key], bool):
            parent[key] = self.draw.choice(
                [-parent[key], parent[key] + 1, parent[key] * 2**40, float(parent[key]), str(parent[key])]
            )
        else:
            parent[key] = [parent[key]] if self.draw.random() < 0.5 else {"value": parent[key]}

    def bytes(self, raw: bytes) -> bytes:
        """``raw`` cut short, or with bytes changed, inserted or left out; sometimes with another encoding or none."""
        draw = self.draw
        kind = draw.random()
        if kind < 0.2:
            return raw[: draw.randrange(len(raw) + 1)]
        if kind < 0.3:
            text = raw.decode("utf-8", errors="replace")
            return draw.choice([
                b"\xef\xbb\xbf" + raw, text.encode("utf-16"), text.encode("utf-32"), b"", b"\0" * 64, b"null", b"[]", b"{}", b"0", b'""',
                raw + raw, raw + b"\0", b"\x80" + raw, b"[" * 50_000, b'{"":' * 50_000, draw.randbytes(40),
            ])  # fmt: skip
        out = bytearray(raw)
        for _ in range(draw.choice([1, 1, 2, 5])):
            at = draw.randrange(len(out) + 1)
            piece = draw.choice(
                [
                    b"",
                    b"",
                    draw.randbytes(1),
                    draw.randbytes(1),
                    draw.randbytes(8),
                    b"\xff" * 8,
                    b"\0" * 4,
                    b'"',
                    b"\xed\xa0\x80",
                ]
            )
            out[at : at + draw.choice([0, 0, 1, len(piece), len(piece), 4])] = piece
        return bytes(out)


def _places(container: Any) -> Iterator[tuple[Any, Any]]:
    """(parent, key) of every value inside ``container``, outer ones first."""
    for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
        yield container, key
        if isinstance(value, dict | list):
            yield from _places(value)


def dump(value: Any) -> bytes:
    """JSON text of a value with :class:`Raw` pieces in it."""
    pieces: list[str] = []

    def mark(item: Any) -> str:
        pieces.append(item.text)
        return f"@raw {len(pieces) - 1}@"

    text = json.dumps(value, default=mark)
    for number, piece in enumerate(pieces):
        text = text.replace(f'"@raw {number}@"', piece, 1)
    return text.encode("utf-8", errors="surrogatepass")


class Findings(AssertionError):
    """Inputs that broke a rule."""


class _Hang(BaseException):
    """Not an Exception, so that no handler of the code under test swallows it."""


class Trial:
    """Gives inputs to code, and counts.

    Args:
        refusals: the types that a refusal may have; exactly these, because Python's own errors are subclasses of some.
        quotes: what stands before the words of a library, which may be those of Python's own errors; elsewhere in a
            text these are a finding.
    """

    def __init__(self, *refusals: type[Exception], quotes: str = "") -> None:
        self._refusals, self._quotes = refusals, quotes
        self.accepted = self.refused = 0
        self.findings: list[str] = []
        self._held = contextlib.ExitStack()

    @property
    def tried(self) -> int:
        """How many inputs there were."""
        return self.accepted + self.refused + len(self.findings)

    def give(self, action: Callable[[], object], shown: object, *, names: str = "") -> None:
        """Run ``action``.  ``shown`` describes its input in findings; a refusal has to say ``names``."""
        before = self.accepted, self.refused
        try:
            with _in_time():
                action()
            self.accepted += 1
        except self._refusals as error:
            if type(error) not in self._refusals:
                self._note(
                    f"{type(error).__name__}, a kind of the allowed {type(error).__mro__[1].__name__}: {error}",
                    shown,
                    error,
                )
            elif fault := self._fault_of(str(error), names):
                self._note(fault, shown, error)
            else:
                self.refused += 1
        except (Exception, _Hang) as error:
            self._note(f"{type(error).__name__}: {error}", shown, error)
        except BaseException as error:  # a panic of a library in Rust
            if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
                raise
            self._note(f"{type(error).__name__}: {error}", shown, error)
        if (grown := self._peak() - self._ceiling) > MAX_GROWTH:
            self.accepted, self.refused = before
            self._note(f"{grown >> 20} MiB of memory", shown, None)

    def _fault_of(self, text: str, names: str) -> str:
        """What is wrong with the text of a refusal; empty if nothing is."""
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"a text that cannot be printed: {text!a:.300}"
        if names not in text:
            return f"{names!r} is not named: {text[:500]}"
        if len(text) > 4000:
            return f"a text of {len(text)} characters: {text[:200]}"
        own = text.partition(self._quotes)[0] if self._quotes else text
        found = next((word for word in PYTHONS_OWN if word in own), "")
        return f"words of Python's own errors ({found}): {text[:500]}" if found or "MemoryError" in text else ""

    def _note(self, fault: str, shown: object, error: BaseException | None) -> None:
        frames = traceback.extract_tb(error.__traceback__)[-4:] if error else []
        where = " <- ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
        self.findings.append(f"{fault[:700]}\n    at {where}\n    given {shown!r:.400}")

    def __enter__(self) -> Trial:
        self._held.enter_context(_quietly())
        self._held.enter_context(_bounded_memory())
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        self._held.callback(os.close, self._status)
        Path("/proc/self/clear_refs").write_text("5")  # the highest memory use so far is forgotten
        self._ceiling = self._peak()
        return self

    def _peak(self) -> int:
        """Most memory [bytes] that this process had since :meth:`__enter__`."""
        status = os.pread(self._status, 4096, 0)
        return int(status[status.index(b"VmHWM:") + 6 :].split(maxsplit=1)[0]) << 10

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._held.close()
        if kind is None and self.findings:
            kinds = {finding.splitlines()[1]: finding for finding in self.findings}
            listed = "\n".join(f"  {finding}" for finding in list(kinds.values())[:30])
            raise Findings(f"{len(self.findings)} of {self.tried} inputs, {len(kinds)} kinds:\n{listed}")

    def check(self, tried: int, *, refused: float = 0.05, accepted: float = 0.05) -> None:
        """Raise unless so many inputs were tried, and a share of them was refused and a share accepted."""
        assert self.tried >= tried, f"{self.tried} inputs, expected {tried}"
        assert self.refused >= refused * tried and self.accepted >= accepted * tried, (
            self.refused,
            self.accepted,
            tried,
        )


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    """Let the block use :data:`CPU_SECONDS`; pytest-timeout, which has the other timer, ends what only waits."""

    def give_up(*_: object) -> None:
        raise _Hang(f"no end after {CPU_SECONDS:g} seconds of CPU")

    before = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _bounded_memory() -> Iterator[None]:
    """Let the block have 4 GiB of addresses more than it has now: the machine must not swap for a test."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (4 << 30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings of libraries about odd values."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
