"""Which network interface the processes of one machine use between themselves."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping, MutableMapping

_CHOSEN = "TROPD_CHOSE_LOOPBACK"
_LOOPBACK_INTERFACE = "lo"


def loopback_variables() -> dict[str, str]:
    """Return the environment variables with which gloo listens on the loopback address only; none where the machine has
    no interface of that name.

    Without them it listens on the address of the host's name, which other machines may reach: it has no authentication.
    """
    with contextlib.suppress(OSError):
        if _LOOPBACK_INTERFACE in (name for _, name in socket.if_nameindex()):
            return {"GLOO_SOCKET_IFNAME": _LOOPBACK_INTERFACE}
    return {}


def choose_loopback(environ: MutableMapping[str, str]) -> None:
    """Set these variables where the user has set none of them."""
    for name, value in loopback_variables().items():
        if name not in environ:
            environ[name] = value
            environ[_CHOSEN] = "1"


def without_chosen(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment as the user made it.

    What :func:`choose_loopback` set is for this process: a server over several machines must not inherit it.
    """
    chosen = {_CHOSEN, *loopback_variables()} if _CHOSEN in environ else set()
    return {name: value for name, value in environ.items() if name not in chosen}
