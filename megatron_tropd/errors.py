"""Errors that several rooms raise and handle."""


class EngineError(RuntimeError):
    """Something that writes or scores tokens cannot do its work, or refuses its input."""
