"""How a JSON body is read: from who has the key, strictly, and never deeper than a fixed nesting.

pydantic's own parser refuses what Python's lets through: NaN and Infinity, lone surrogates, and nesting
beyond 200 levels whatever the interpreter's recursion limit. Knows no route; runs on the event loop.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from server.auth import check_key
from server.errors import InvalidRequestError, MediaTypeError
from server.validation import describe

__all__ = ["JsonRoute"]

_CHARSET = re.compile(r"charset\s*=\s*\"?([^\s\";]+)")
_UTF8_NAMES = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})


class JsonRoute(APIRoute):
    """A route whose JSON body is read strictly, once the key is right: `APIRouter(route_class=JsonRoute)`.

    Its router still needs the dependency `require_api_key`, which FastAPI calls only after the body.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            check_key(request)
            _refuse_compressed(request)
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


class _StrictRequest(Request):
    async def body(self) -> bytes:
        """The bytes of a body that says to be JSON in UTF-8, without a byte order mark."""
        body = await super().body()
        if body:
            _require_json(self.headers.get("content-type"))
        return body.removeprefix(codecs.BOM_UTF8)

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            try:
                self._json = from_json(body, allow_inf_nan=False)
            except ValueError as error:
                raise _not_json(body, error) from None
        return self._json


def _refuse_compressed(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise MediaTypeError(
            f"The body is compressed: its Content-Encoding is {describe(encoding)}. Compressed bodies are "
            "not read here; send it as it is, without that header.",
            code="unsupported_content_encoding",
        )


def _require_json(content_type: str | None) -> None:
    kind, _, parameters = (content_type or "").lower().partition(";")
    kind = kind.strip()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        came = f"it is {describe(content_type)}" if content_type else "there is none"
        message = f"Expected a JSON body with the header 'Content-Type: application/json', but {came}."
        raise InvalidRequestError(message)
    charset = _CHARSET.search(parameters)
    if charset is not None and charset[1] not in _UTF8_NAMES:
        raise MediaTypeError(
            f"The body's charset is {describe(charset[1])}, but JSON is read as UTF-8 here. Encode it so, "
            "and leave the charset out.",
            code="unsupported_charset",
        )


def _not_json(body: bytes, error: ValueError) -> InvalidRequestError:
    encoding = json.detect_encoding(body)
    if not encoding.startswith("utf-8"):
        name = encoding.upper()
        return InvalidRequestError(f"The body is not valid JSON: it seems to be {name}; encode it as UTF-8.")
    return InvalidRequestError(f"The body is not valid JSON: {error}.")
