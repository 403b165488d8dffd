"""The tree of errors that the engine raises to its callers.

EngineError
├── ModelLoadError         the model cannot be found, fetched, read or served
├── InvalidSubmitError     a request that the engine must not compute
├── EngineMemoryError      a request that alone needs more memory than all may take
├── EngineOverloadedError  too many requests wait already
├── EngineStoppedError     the generation thread is not there, or is stopping
└── EngineStuckError       the generation thread gives no sign of life
"""

from __future__ import annotations

__all__ = [
    "EngineError",
    "EngineMemoryError",
    "EngineOverloadedError",
    "EngineStoppedError",
    "EngineStuckError",
    "InvalidSubmitError",
    "ModelLoadError",
]


class EngineError(Exception):
    """Anything that the engine raises on purpose."""


class ModelLoadError(EngineError):
    """A model that cannot be loaded; the message is one sentence for the person who named it."""


class InvalidSubmitError(EngineError):
    """A request whose numbers would make the engine compute nonsense or read out of bounds."""


class EngineMemoryError(EngineError):
    """A request of `rows` rows of up to `tokens` tokens needs `needed_bytes` of `limit_bytes`."""

    def __init__(self, rows: int, tokens: int, needed_bytes: int, limit_bytes: int) -> None:
        self.rows = rows
        self.tokens = tokens
        self.needed_bytes = needed_bytes
        self.limit_bytes = limit_bytes
        super().__init__(
            f"{rows} x {tokens} tokens, prompt and answer, may need {needed_bytes / 2**20:,.0f} MiB for "
            f"their KV caches, and this server has {limit_bytes / 2**20:,.0f} MiB for them"
        )


class EngineOverloadedError(EngineError):
    """The queue is full: `waiting` requests wait, at most `limit` may. Half of them take `retry_seconds`."""

    def __init__(self, waiting: int, limit: int, retry_seconds: float = 1.0) -> None:
        self.waiting = waiting
        self.limit = limit
        self.retry_seconds = retry_seconds
        super().__init__(f"{waiting} requests are waiting and at most {limit} may; try again later")


class EngineStoppedError(EngineError):
    """The generation thread has not started, is stopping, or has ended."""


class EngineStuckError(EngineError):
    """The generation thread gave no sign of life for `seconds`: what it computes takes too long, or hangs."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"the generation thread gave no sign of life for {seconds:.0f} s")
