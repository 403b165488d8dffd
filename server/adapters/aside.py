"""Runs a function that uses MLX beside the generation, on a thread of its own.

What the function returns must be evaluated, for lazy arrays do not leave their thread. Not for functions
without MLX: `asyncio.to_thread` has threads at hand for those.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

import mlx.core as mx

__all__ = ["run_aside"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def run_aside(fn: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """What `fn` returns or raises; it runs to its end even if the caller's task is cancelled."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            result = fn(*args, **kwargs)
        except BaseException as error:
            mx.clear_streams()
            future.set_exception(error)
        else:
            # MLX's threads must end before this one does, or the process may abort when it exits.
            mx.clear_streams()
            future.set_result(result)

    threading.Thread(target=run, name="adapter").start()
    return await asyncio.shield(asyncio.wrap_future(future))
