"""A call that takes long, told as server-sent events while it goes on.

`data: {"object": "adapter.fusion.progress", "stage", "done", "total"}` for each step, then the call's own
answer, then `[DONE]`. What fails before the first step is an ordinary error reply; a later failure is an
event `{"error": …}` without `[DONE]`. The call goes on when the client leaves. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import structlog
from fastapi import Response
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event

from server.adapters.fusing.progress import FuseProgress, Tell
from server.errors import InternalError, to_api_error

__all__ = ["with_progress"]

_log = structlog.get_logger(__name__)

_KEEPALIVE_SECONDS = 15.0
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


async def with_progress(work: Callable[[Tell], Awaitable[dict[str, Any]]]) -> Response:
    """The answer of `work` as events, with what it tells of its progress. Raises what it raises at once."""
    steps: asyncio.Queue[FuseProgress] = asyncio.Queue()
    task = asyncio.ensure_future(work(steps.put_nowait))
    task.add_done_callback(_take_note)
    first = asyncio.ensure_future(steps.get())
    try:
        await asyncio.wait({task, first}, return_when=asyncio.FIRST_COMPLETED)
    except BaseException:
        first.cancel()
        raise
    if not first.done():
        first.cancel()
        task.result()  # raises what went wrong
    return EventSourceResponse(_events(task, first, steps), headers=_HEADERS)


async def _events(
    task: asyncio.Future[dict[str, Any]],
    first: asyncio.Future[FuseProgress],
    steps: asyncio.Queue[FuseProgress],
) -> AsyncIterator[bytes]:
    step = first
    try:
        while True:
            await asyncio.wait({task, step}, timeout=_KEEPALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if step.done() and not step.cancelled():
                yield _event(_progress(step.result()))
                step = asyncio.ensure_future(steps.get())
            elif task.done():
                break
            else:
                yield KEEPALIVE_COMMENT
    finally:
        step.cancel()  # nobody listens any more, or nothing more will come
    while not steps.empty():
        yield _event(_progress(steps.get_nowait()))
    try:
        yield _event(await task)
        yield format_sse_event(data_str="[DONE]")
    except Exception as error:
        known = to_api_error(error)
        if isinstance(known, InternalError):
            _log.exception("a call with progress failed")
        yield _event(known.body())


def _take_note(task: asyncio.Future[dict[str, Any]]) -> None:
    """What went wrong is known, also when the client that would have been told has left."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        _log.debug("call_with_progress_failed", error=repr(error))


def _progress(step: FuseProgress) -> dict[str, Any]:
    return {
        "object": "adapter.fusion.progress",
        "stage": step.stage,
        "done": step.done,
        "total": step.total,
    }


def _event(data: dict[str, Any]) -> bytes:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return format_sse_event(data_str=text)
