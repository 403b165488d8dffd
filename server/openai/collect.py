"""A reply in one piece, given up if the client leaves before it is whole. Runs on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.openai.choice import Choice, Piece
from server.openai.responses import Reply
from server.openai.run import Run

__all__ = ["CLIENT_CLOSED_REQUEST", "collect", "joined", "respond", "unless_client_leaves"]

_T = TypeVar("_T")

CLIENT_CLOSED_REQUEST = 499  # nobody reads it but the log


async def collect(run: Run, reply: Reply, request: Request) -> Response:
    """Wait for the whole run; closes it however that ends.

    Raises:
        GenerationFailedError: the engine gave it up.
    """

    async def whole() -> dict[str, Any]:
        return reply.whole(await _collect_pieces(run), run.usage)

    return await respond(run, whole(), request)


class Closable(Protocol):
    """What goes on until it is closed."""

    async def aclose(self) -> None: ...


async def respond(run: Closable, whole: Coroutine[Any, Any, dict[str, Any]], request: Request) -> Response:
    """The object that `whole` comes to as the answer to `request`; closes `run` however that ends."""
    try:
        body = await unless_client_leaves(whole, request)
        return Response(status_code=CLIENT_CLOSED_REQUEST) if body is None else JSONResponse(body)
    finally:
        await run.aclose()


async def unless_client_leaves(work: Coroutine[Any, Any, _T], request: Request) -> _T | None:
    """What `work` comes to, which is cancelled if the client leaves first; then None."""
    working = asyncio.create_task(work)
    left = asyncio.create_task(_client_left(request))
    try:
        await asyncio.wait({working, left}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        left.cancel()
        working.cancel()


async def _client_left(request: Request) -> None:
    """Return when the client has gone: nothing else can come once the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collect_pieces(run: Run) -> list[Piece]:
    """One piece for each choice, with all of its text."""
    parts: list[list[Piece]] = [[] for _ in run.choices]
    async for piece in run.pieces():
        if piece is not None:
            parts[piece.choice].append(piece)
    return joined(run.choices, parts)


def joined(choices: Sequence[Choice], parts: Sequence[Sequence[Piece]]) -> list[Piece]:
    """The pieces of each choice as one."""
    return [
        Piece(
            choice.index,
            "".join(piece.text for piece in pieces),
            tuple(score for piece in pieces for score in piece.scores),
            choice.reason,
        )
        for choice, pieces in zip(choices, parts, strict=True)
    ]
