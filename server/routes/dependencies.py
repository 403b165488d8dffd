"""What routes ask for: parts that the application's lifespan put into its state. Runs on the event loop."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from server.adapters.blending import Blender
from server.adapters.saving.adapters import AdapterSaver
from server.adapters.service import AdapterService
from server.engine.engine import Engine
from server.errors import InvalidRequestError
from server.near import named, speaks_of_adapters
from server.openai.comparing import ComparisonService
from server.openai.service import TextService
from server.settings import Settings

__all__ = [
    "Adapters",
    "adapter_service",
    "adapters_named_in_body",
    "blender",
    "comparison_service",
    "engine",
    "options_in_body",
    "saver",
    "settings",
    "text_service",
]


async def adapter_service(request: Request) -> AdapterService:
    """The adapters' life cycle."""
    return request.app.state.adapters


Adapters = Annotated[AdapterService, Depends(adapter_service)]


async def adapters_named_in_body(request: Request) -> None:
    """What is asked to answer is named in the body alone: a header or the URL's query would go unnoticed.

    Raises:
        InvalidRequestError: one of them names an adapter.
    """
    for place, values in (("header", request.headers), ("query parameter", request.query_params)):
        for name, value in values.items():
            if value and speaks_of_adapters(name):
                message = (
                    f"The {place} {named(name)} is not supported: name the adapter in the body's 'model'."
                )
                raise InvalidRequestError(message, param=name[:64], code="unsupported_parameter")


async def options_in_body(request: Request) -> None:
    """What a POST or PUT is to do is said in its body: in the URL's query it would go unnoticed.

    Raises:
        InvalidRequestError: there is a query.
    """
    name = next(iter(request.query_params), None)
    if name is not None and request.method in ("POST", "PUT"):
        message = f"{named(name)} is not a query parameter of this call: what it takes is in the JSON body."
        raise InvalidRequestError(message, param=name[:64], code="unknown_parameter")


async def blender(request: Request) -> Blender:
    """What makes adapters of others."""
    return request.app.state.blender


async def comparison_service(request: Request) -> ComparisonService:
    """The service behind comparisons."""
    return request.app.state.comparison_service


async def engine(request: Request) -> Engine:
    """The generation thread's face."""
    return request.app.state.engine


async def saver(request: Request) -> AdapterSaver:
    """What writes adapters to folders."""
    return request.app.state.saver


async def settings(request: Request) -> Settings:
    """What the server was started with."""
    return request.app.state.settings


async def text_service(request: Request) -> TextService:
    """The service behind chat and completions."""
    return request.app.state.text_service
