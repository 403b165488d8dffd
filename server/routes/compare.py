"""`POST /v1/compare`. Runs on the event loop."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from server.json_body import JsonRoute
from server.openai.collect import CLIENT_CLOSED_REQUEST, respond, unless_client_leaves
from server.openai.comparing import ComparisonService
from server.openai.streaming import ReplyStream
from server.openai.wire import CompareRequest
from server.routes.answering import ANSWERS
from server.routes.dependencies import adapters_named_in_body, comparison_service, options_in_body

__all__ = ["router"]

router = APIRouter(
    prefix="/v1",
    tags=["Comparison"],
    route_class=JsonRoute,
    dependencies=[Depends(adapters_named_in_body), Depends(options_in_body)],
)


@router.post("/compare", response_class=Response, responses=ANSWERS)
async def create_comparison(
    request: Request,
    body: CompareRequest,
    service: Annotated[ComparisonService, Depends(comparison_service)],
) -> Response:
    """Answer a conversation with two to eight models in one batch, and score each answer under each model."""
    compared = await unless_client_leaves(service.compare(body), request)
    if compared is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if body.stream:
        return ReplyStream(compared.comparison, compared.reply)
    return await respond(compared.comparison, compared.whole(), request)
