"""Which network interface the processes of one machine use between themselves."""

from __future__ import annotations

import contextlib
import socket

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
