"""Heartbeats for the rank monitors of nvidia-resiliency-ext, where its ``ft_launcher`` started the job.

A monitor ends its rank when no heartbeat came for ``--ft-rank-heartbeat-timeout``, and the launcher then does what its
flags say, for example start the ranks again.  Here a heartbeat means that the rank has got on, not only that it runs.
"""

from __future__ import annotations

import logging
import os
from typing import Any

_SOCKET_VARIABLE = "FT_RANK_MONITOR_IPC_SOCKET"
"""Set by ft_launcher: where the rank's monitor listens."""

log = logging.getLogger(__name__)


class RankMonitor:
    """Tells the monitor of this rank, if there is one, that it gets on.  For one thread.

    A monitor that cannot be told is a warning, once: it may end the rank, and then this says why.
    """

    def __init__(self) -> None:
        self._client: Any = None
        self._last: object = None

    def tell(self, progress: object) -> None:
        """Send a heartbeat if ``progress``, which is not None, is not what it was at the last call."""
        if progress == self._last:
            return
        if self._last is None:  # connected only now: a monitor expects heartbeats of whoever has come to it
            self._client = _connect()
        self._last = progress
        if self._client is None:
            return
        try:
            self._client.send_heartbeat()
        except Exception as error:  # of the package, or of its socket
            log.warning("the rank monitor of ft_launcher gets no heartbeats any more: %s", error)
            self._client = None

    def close(self) -> None:
        """Leave the monitor: it waits for no more heartbeats."""
        client, self._client = self._client, None
        if client is not None:
            try:
                client.shutdown_workload_monitoring()
            except OSError as error:
                log.warning("the rank monitor of ft_launcher cannot be left: %s", error)


def _connect() -> Any:
    if _SOCKET_VARIABLE not in os.environ:
        return None
    try:
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

        client = RankMonitorClient()
        client.init_workload_monitoring()
    except Exception as error:  # not installed in this environment, or of another version
        log.warning("ft_launcher started this rank, but its rank monitor cannot be told of progress: %s", error)
        return None
    return client
