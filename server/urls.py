"""Which URLs and methods there are: HEAD and OPTIONS for each, slashes at the end, and what was meant.

Asks the application's routes, and knows none itself. Runs on the event loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["UrlMiddleware", "allowed_methods", "meant_url"]

_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH")

# What other servers call what is here: Ollama, llama.cpp, TGI, SGLang.
_OTHER_NAMES = {
    "/api/chat": "/v1/chat/completions",
    "/api/generate": "/v1/completions",
    "/api/tags": "/v1/models",
    "/completion": "/v1/completions",
    "/generate": "/v1/completions",
    "/generate_stream": "/v1/completions",
}
# Of a path's end; each costs a look at every route.
_MOST_SEGMENTS = 6


class UrlMiddleware:
    """Serves HEAD as GET without its body, answers OPTIONS, and takes slashes at the end of a path away.

    It stands next to the routes, so that what guards them sees the request as it came.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = {**scope, "path": scope["path"].rstrip("/") or "/"}
        if scope["method"] == "OPTIONS":
            allowed = allowed_methods(scope["app"].routes, asked["path"])
            if allowed:
                headers = {"Allow": ", ".join([*allowed, "OPTIONS"])}
                await Response(status_code=204, headers=headers)(scope, receive, send)
                return
        if scope["method"] == "HEAD":
            asked["method"], send = "GET", _without_body(send)
        try:
            await self._app(asked, receive, send)
        finally:
            if "route" in asked:  # the metrics' label
                scope["route"] = asked["route"]


def allowed_methods(routes: Sequence[BaseRoute], path: str) -> list[str]:
    """The methods of all routes that `path` leads to, HEAD among them where GET is."""
    found = [method for method in _METHODS if _match(routes, method, path) is Match.FULL]
    return [*found, "HEAD"] if "GET" in found else found


def meant_url(routes: Sequence[BaseRoute], method: str, path: str) -> str | None:
    """`METHOD /url` of what a `path` that leads nowhere was most likely meant to be, or None.

    That is its end, with `/v1` before it or not, for the longest end that leads somewhere.
    """
    segments = [segment for segment in path.split("/") if segment][-_MOST_SEGMENTS:]
    ends = ["/".join(segments[start:]) for start in range(len(segments))]
    urls = [f"{prefix}/{end}" for end in ends for prefix in ("/v1", "")]
    named = _OTHER_NAMES.get(path.rstrip("/"), path)
    for url in dict.fromkeys([named, *urls, *[url.lower() for url in urls]]):
        if url != path and _match(routes, method, url) is not Match.NONE:
            allowed = allowed_methods(routes, url)
            return f"{method if method in allowed else allowed[0]} {url}"
    return None


def _match(routes: Sequence[BaseRoute], method: str, path: str) -> Match:
    """The best match of any route."""
    scope: dict[str, Any] = {"type": "http", "method": method, "path": path, "root_path": ""}
    best = Match.NONE
    for route in routes:
        match, _ = route.matches(scope)
        if match is Match.FULL:
            return match
        best = max(best, match, key=lambda each: each.value)
    return best


def _without_body(send: Send) -> Send:
    async def send_head(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return send_head
