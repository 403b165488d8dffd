"""How a JSON body is read: from who has the key, strictly, and never deeper than a fixed nesting.

pydantic's own parser refuses what Python's lets through: NaN and Infinity, lone surrogates, and nesting
beyond 200 levels whatever the interpreter's recursion limit. Knows no route; runs on the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from server.auth import check_key
from server.errors import InvalidRequestError

__all__ = ["JsonRoute"]


class JsonRoute(APIRoute):
    """A route whose JSON body is read strictly, once the key is right: `APIRouter(route_class=JsonRoute)`.

    Its router still needs the dependency `require_api_key`, which FastAPI calls only after the body.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            check_key(request)
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
