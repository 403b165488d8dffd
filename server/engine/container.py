"""The only door through which others reach what the generation thread owns.

It lives on the event loop: it hands a function over to that thread and waits. Knows nothing of adapter names,
requests or HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from .context import ModelContext
from .messages import Update

__all__ = ["ModelContainer"]

_T = TypeVar("_T")


class ModelContainer:
    """Runs functions on the generation thread, between two steps of the generation.

    A function that was handed over runs even if the caller's task is cancelled while it waits. If the thread
    ends first, the caller gets EngineStoppedError.
    """

    def __init__(self, post: Callable[[Update], None]) -> None:
        self._post = post
        self._lock = asyncio.Lock()

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
        self._post(Update(fn, future, drain))
        return await asyncio.shield(asyncio.wrap_future(future))
