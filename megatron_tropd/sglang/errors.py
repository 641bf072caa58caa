"""Errors of a server, one class for each way of handling it."""

from megatron_tropd.errors import EngineError


class EngineDown(EngineError):
    """The server is gone or does not answer: other servers take over its requests, and it is restarted."""


class NoConnection(EngineDown):
    """No connection could be made, or it broke: nothing was answered."""


class EngineTimeout(EngineDown):
    """A request was not answered within its deadline, or the server made no progress while the request waited."""


class RequestRefused(EngineError):
    """The server answered 4xx: the same request would be refused again."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status of the answer."""


class BadResponse(EngineError):
    """The server answered with something that is not what was asked for: malformed, too short, NaN, foreign ids."""


class StaleWeights(EngineError):
    """The server wrote with, or holds, other weights than those that were pushed."""


class UnfitServer(EngineError):
    """The server runs with settings that do not fit this run; started anew it would do so again."""
