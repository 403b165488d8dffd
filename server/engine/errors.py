"""The tree of errors that the engine raises to its callers.

EngineError
├── ModelLoadError         the model cannot be found, fetched, read or served
├── InvalidSubmitError     a request that the engine must not compute
├── EngineOverloadedError  too many requests wait already
└── EngineStoppedError     the generation thread is not there, or is stopping
"""

from __future__ import annotations

__all__ = [
    "EngineError",
    "EngineOverloadedError",
    "EngineStoppedError",
    "InvalidSubmitError",
    "ModelLoadError",
]


class EngineError(Exception):
    """Anything that the engine raises on purpose."""


class ModelLoadError(EngineError):
    """A model that cannot be loaded; the message is one sentence for the person who named it."""


class InvalidSubmitError(EngineError):
    """A request whose numbers would make the engine compute nonsense or read out of bounds."""


class EngineOverloadedError(EngineError):
    """The queue is full: `waiting` requests wait, at most `limit` may. Half of them take `retry_seconds`."""

    def __init__(self, waiting: int, limit: int, retry_seconds: float = 1.0) -> None:
        self.waiting = waiting
        self.limit = limit
        self.retry_seconds = retry_seconds
        super().__init__(f"{waiting} requests are waiting and at most {limit} may; try again later")


class EngineStoppedError(EngineError):
    """The generation thread has not started, is stopping, or has ended."""
