"""What the routes that generate text share: their response's description, and how an answer is sent.

Runs on the event loop.
"""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from server.openai.collect import collect
from server.openai.service import Answer
from server.openai.streaming import ReplyStream

__all__ = ["ANSWERS", "send"]

ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or its chunks",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


async def send(answer: Answer, request: Request, stream: bool) -> Response:
    """`answer` as server-sent events, or in one piece."""
    if stream:
        return ReplyStream(answer.run, answer.reply)
    return await collect(answer.run, answer.reply, request)
