"""What can go wrong with a server, by what is to be done about it."""

from megatron_tropd.rollout.engine import EngineError


class EngineDown(EngineError):
    """The server is gone or does not answer: others take over its requests, and it is started anew."""


class EngineTimeout(EngineDown):
    """A request outlived its deadline."""


class RequestRefused(EngineError):
    """The server answered 4xx: the same request would be refused again."""


class BadResponse(EngineError):
    """The server answered with something that is not a rollout: malformed, too short, NaN, foreign ids."""


class StaleWeights(EngineError):
    """The server wrote with, or holds, other weights than those that were pushed."""
