"""Work that goes on to its end, whoever stops waiting for it, and that takes turns by id.

Runs on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import structlog

from .errors import LifeCycleError

__all__ = ["Tasks"]

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


class Tasks:
    """The work that is under way, and a lock for each id that work is about.

    Who waits for work waits within `while_alive`, which may end the waiting.
    """

    def __init__(self, while_alive: Callable[[], AbstractAsyncContextManager[None]]) -> None:
        self._while_alive = while_alive
        self._running: set[asyncio.Task[Any]] = set()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def lock(self, adapter_id: str) -> asyncio.Lock:
        """What work on one id holds while it changes it; work on different ids does not wait."""
        return self._locks.setdefault(adapter_id, asyncio.Lock())

    def start(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Begin `work`, which nobody has to wait for."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._forget)
        return task

    async def to_the_end(self, work: Coroutine[Any, Any, _T]) -> _T:
        """What comes of `work`, which goes on if the caller is cancelled, or may wait no longer."""
        task = self.start(work)
        async with self._while_alive():
            return await asyncio.shield(task)

    async def ended(self) -> None:
        """Wait until nothing is under way."""
        while self._running:
            await asyncio.wait(set(self._running))

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, LifeCycleError):
            _log.debug("adapter_call_failed", error=repr(error))
