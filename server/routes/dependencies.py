"""What routes ask for: parts that the application's lifespan put into its state. Runs on the event loop."""

from __future__ import annotations

from fastapi import Request

from server.openai.service import TextService

__all__ = ["text_service"]


async def text_service(request: Request) -> TextService:
    """The service behind chat and completions."""
    return request.app.state.text_service
