"""How a JSON body is read: strictly, and never deeper than a fixed nesting.

pydantic's own parser refuses what Python's lets through: NaN and Infinity, lone surrogates, and nesting
beyond 200 levels whatever the interpreter's recursion limit. Knows no route; runs on the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from server.errors import InvalidRequestError

__all__ = ["JsonRoute"]


class JsonRoute(APIRoute):
    """A route whose JSON body is read strictly: `APIRouter(route_class=JsonRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


class _StrictRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            try:
                self._json = from_json(body, allow_inf_nan=False)
            except ValueError as error:
                raise InvalidRequestError(f"The body is not valid JSON: {error}.") from None
        return self._json
