"""A reply in one piece, given up if the client leaves before it is whole. Runs on the event loop."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.openai.choice import Piece
from server.openai.responses import Reply
from server.openai.run import Run

__all__ = ["CLIENT_CLOSED_REQUEST", "client_left", "collect"]

CLIENT_CLOSED_REQUEST = 499  # nobody reads it but the log


async def collect(run: Run, reply: Reply, request: Request) -> Response:
    """Wait for the whole run; closes it however that ends.

    Raises:
        GenerationFailedError: the engine gave it up.
    """
    whole = asyncio.create_task(_collect_pieces(run))
    left = asyncio.create_task(client_left(request))
    try:
        await asyncio.wait({whole, left}, return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        return JSONResponse(reply.whole(whole.result(), run.usage))
    finally:
        whole.cancel()
        left.cancel()
        await run.aclose()


async def client_left(request: Request) -> None:
    """Return when the client has gone: nothing else can come once the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collect_pieces(run: Run) -> list[Piece]:
    """One piece for each choice, with all of its text."""
    parts: list[list[Piece]] = [[] for _ in run.choices]
    async for piece in run.pieces():
        if piece is not None:
            parts[piece.choice].append(piece)
    return [
        Piece(
            choice.index,
            "".join(piece.text for piece in pieces),
            tuple(score for piece in pieces for score in piece.scores),
            choice.reason,
        )
        for choice, pieces in zip(run.choices, parts, strict=True)
    ]
