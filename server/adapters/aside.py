"""Threads that use MLX beside the generation: a fixed number, which live as long as the server.

MLX keeps a thread, and a stream, for each thread that ever evaluated an array, and never lets go of them. So
a thread for each piece of work would be one more for ever. Not for functions without MLX:
`asyncio.to_thread` has threads at hand for those.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import ParamSpec, TypeVar

import mlx.core as mx

__all__ = ["Aside"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_MEET_SECONDS = 60


class Aside:
    """`threads` threads called `name`; work beyond them waits its turn."""

    def __init__(self, name: str, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    def start(self) -> None:
        """Start all threads now, and MLX's for them, so that later work needs none.

        Raises: RuntimeError, OSError: the system has no threads to give.
        """
        self._on_each(lambda: mx.eval(mx.zeros(1) + 1))

    async def run(self, fn: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What `fn` returns or raises; it runs to its end even if the caller's task is cancelled.

        What it returns must be evaluated, for lazy arrays do not leave their thread.
        """
        future = self._pool.submit(partial(fn, *args, **kwargs))
        return await asyncio.shield(asyncio.wrap_future(future))

    def close(self) -> None:
        """End the threads when their work is done."""
        # MLX's streams must end before these do, or the process may abort when it exits.
        with suppress(RuntimeError):  # no threads to be had for those that never ran
            self._on_each(mx.clear_streams)
        self._pool.shutdown()

    def _on_each(self, fn: Callable[[], None]) -> None:
        meeting = threading.Barrier(self._threads)

        def run() -> None:
            meeting.wait(_MEET_SECONDS)  # so that each thread has one
            fn()

        try:
            done = [self._pool.submit(run) for _ in range(self._threads)]
        except RuntimeError:
            meeting.abort()
            raise
        for each in done:
            each.result()
