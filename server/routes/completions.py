"""`POST /v1/completions`. Runs on the event loop."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from server.json_body import JsonRoute
from server.openai.collect import collect
from server.openai.service import TextService
from server.openai.streaming import ReplyStream
from server.openai.wire import CompletionRequest
from server.routes.dependencies import text_service

__all__ = ["router"]

_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or its chunks",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=JsonRoute)


@router.post("/completions", response_class=Response, responses=_ANSWER)
async def create_completion(
    request: Request, body: CompletionRequest, service: Annotated[TextService, Depends(text_service)]
) -> Response:
    """Continue one or more prompts, texts or token ids, in one piece or as server-sent events."""
    answer = await service.complete(body)
    if body.stream:
        return ReplyStream(answer.run, answer.reply)
    return await collect(answer.run, answer.reply, request)
