"""What the routes that generate text share: their response's description, and how an answer is sent.

A request may wait for its adapters before anything is computed; one whose client leaves waits no longer.

Runs on the event loop.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from fastapi import Request, Response

from server.openai.collect import CLIENT_CLOSED_REQUEST, collect, unless_client_leaves
from server.openai.service import Answer
from server.openai.streaming import ReplyStream

__all__ = ["ANSWERS", "send"]

ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or its chunks",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


async def send(start: Coroutine[Any, Any, Answer], request: Request, stream: bool) -> Response:
    """The answer that `start` comes to, as server-sent events or in one piece."""
    answer = await unless_client_leaves(start, request)
    if answer is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if stream:
        return ReplyStream(answer.run, answer.reply)
    return await collect(answer.run, answer.reply, request)
