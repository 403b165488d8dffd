"""`POST /v1/chat/completions`. Runs on the event loop."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from server.json_body import JsonRoute
from server.openai.service import TextService
from server.openai.wire import ChatRequest
from server.routes.answering import ANSWERS, send
from server.routes.dependencies import adapters_named_in_body, text_service

__all__ = ["router"]

router = APIRouter(
    prefix="/v1",
    tags=["OpenAI"],
    route_class=JsonRoute,
    dependencies=[Depends(adapters_named_in_body)],
)


@router.post("/chat/completions", response_class=Response, responses=ANSWERS)
async def create_chat_completion(
    request: Request, body: ChatRequest, service: Annotated[TextService, Depends(text_service)]
) -> Response:
    """Answer a conversation with the base model or an adapter, in one piece or as server-sent events."""
    return await send(service.chat(body), request, bool(body.stream))
