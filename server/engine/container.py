"""The only door through which others reach what the generation thread owns.

It lives on the event loop: it hands a function over to that thread and waits. Knows nothing of adapter names,
requests or HTTP.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from .context import ModelContext
from .errors import EngineStuckError
from .messages import Update

__all__ = ["ModelContainer"]

_T = TypeVar("_T")

_LOOK_SECONDS = 1.0


class ModelContainer:
    """Runs functions on the generation thread, between two steps of the generation.

    A function that was handed over runs even if the caller's task is cancelled while it waits. If the thread
    ends first, the caller gets EngineStoppedError.
    """

    def __init__(
        self,
        post: Callable[[Update], None],
        beat_age_seconds: Callable[[], float] = lambda: 0.0,
        stuck_seconds: float = math.inf,
    ) -> None:
        """`beat_age_seconds` says when the thread last turned; it is stuck after `stuck_seconds` without."""
        self._post = post
        self._beat_age_seconds = beat_age_seconds
        self._stuck_seconds = stuck_seconds
        self._lock = asyncio.Lock()
        self._waiting: set[Future[Any]] = set()

    def require_alive(self) -> None:
        """Raises: EngineStuckError."""
        if (seconds := self._beat_age_seconds()) > self._stuck_seconds:
            raise EngineStuckError(seconds)

    @asynccontextmanager
    async def while_alive(self) -> AsyncIterator[None]:
        """What waits for the thread within is cancelled when that is stuck, or not begun.

        Raises: EngineStuckError.
        """
        self.require_alive()
        loop = asyncio.get_running_loop()
        limit = asyncio.timeout(None)

        def look() -> None:
            nonlocal timer
            if self._beat_age_seconds() > self._stuck_seconds:
                limit.reschedule(loop.time())
            else:
                timer = loop.call_later(_LOOK_SECONDS, look)

        timer = loop.call_later(_LOOK_SECONDS, look)
        try:
            async with limit:
                yield
        except TimeoutError:
            if limit.expired():
                raise EngineStuckError(self._beat_age_seconds()) from None
            raise
        finally:
            timer.cancel()

    def give_up(self, error: Exception) -> None:
        """Whoever waits for the thread gets `error`; what becomes of their functions is nobody's affair."""
        for future in list(self._waiting):
            with suppress(InvalidStateError):
                future.set_exception(error)

    async def update(self, fn: Callable[[ModelContext], _T], *, drain: bool = False) -> _T:
        """Run `fn`, which may change the model; one update at a time, in the order of the callers.

        With `drain`, the requests being computed finish first and no other is admitted until `fn` has run:
        what changing the base itself needs. What `fn` raises is raised here, and nowhere else.
        """
        async with self._lock:
            return await self._run(fn, drain)

    async def perform(self, fn: Callable[[ModelContext], _T]) -> _T:
        """Run `fn`, which only reads, or changes what no other depends on; it does not queue for updates."""
        return await self._run(fn, False)

    async def _run(self, fn: Callable[[ModelContext], _T], drain: bool) -> _T:
        future: Future[_T] = Future()
        self._waiting.add(future)
        future.add_done_callback(self._waiting.discard)
        try:
            self._post(Update(fn, future, drain))
        except BaseException:
            self._waiting.discard(future)
            raise
        return await asyncio.shield(asyncio.wrap_future(future))
