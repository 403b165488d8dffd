"""A reply as server-sent events.

FastAPI's way, an endpoint that yields events, starts the endpoint after the status line is sent: an
unknown model or a full queue could no longer be a 404 or a 503, and an error would end the stream as if
all were well. So the route does everything that can be refused first and then returns this response; the
events' form and the keep-alive comment are fastapi.sse's. Runs on the event loop.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol, TypeVar

import structlog
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.types import Receive, Scope, Send

from server.errors import InternalError, to_api_error
from server.openai.run import Usage

__all__ = ["KEEPALIVE_SECONDS", "Chunks", "Pieces", "ReplyStream"]

_log = structlog.get_logger(__name__)
_P = TypeVar("_P")
_P_co = TypeVar("_P_co", covariant=True)
_P_contra = TypeVar("_P_contra", contravariant=True)

# Proxies cut connections on which nothing moves, commonly after 30 or 60 seconds.
KEEPALIVE_SECONDS = 15.0

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Pieces(Protocol[_P_co]):
    """What is sent, piece by piece. Whoever has it closes it."""

    @property
    def choices(self) -> Sequence[object]: ...

    @property
    def usage(self) -> Usage: ...

    def pieces(self, idle_seconds: float | None = None) -> AsyncIterator[_P_co | None]: ...

    async def aclose(self) -> None: ...


class Chunks(Protocol[_P_contra]):
    """How it is worded; see `responses.Reply`."""

    def opening(self, choices: int) -> list[dict[str, Any]]: ...

    def chunks(self, piece: _P_contra) -> list[dict[str, Any]]: ...

    def closing(self, usage: Usage) -> list[dict[str, Any]]: ...


class ReplyStream(EventSourceResponse):
    """Sends a run piece by piece, then `[DONE]`; an error becomes an event of its own, without `[DONE]`.

    The run is closed when the response ends in any way: also when the client leaves, and when it was
    never sent.
    """

    def __init__(
        self, run: Pieces[_P], reply: Chunks[_P], keepalive_seconds: float = KEEPALIVE_SECONDS
    ) -> None:
        super().__init__(_events(run, reply, keepalive_seconds), headers=_HEADERS)
        self._run = run

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._run.aclose()


async def _events(run: Pieces[_P], reply: Chunks[_P], keepalive_seconds: float) -> AsyncIterator[bytes]:
    try:
        for chunk in reply.opening(len(run.choices)):
            yield _event(chunk)
        async for piece in run.pieces(keepalive_seconds):
            if piece is None:
                yield KEEPALIVE_COMMENT
                continue
            for chunk in reply.chunks(piece):
                yield _event(chunk)
        for chunk in reply.closing(run.usage):
            yield _event(chunk)
        yield format_sse_event(data_str="[DONE]")
    except Exception as error:
        known = to_api_error(error)
        if isinstance(known, InternalError):
            _log.exception("a stream failed")
        yield _event(known.body())


def _event(data: dict[str, Any]) -> bytes:
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return format_sse_event(data_str=text)
