"""What happens around every request: its id, who may send it, and the last resort.

Plain ASGI, outermost first: RequestId, (metrics, bodies,) HostGuard, (CORS,) UnexpectedError. They
know no route and no model, and hand streams through untouched. Run on the event loop.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, ForbiddenError, error_response

__all__ = ["HostGuardMiddleware", "RequestIdMiddleware", "UnexpectedErrorMiddleware"]

_log = structlog.get_logger(__name__)

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_HOST_AND_PORT = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[^:/@\[\]]+)(?::(?P<port>[0-9]{1,5}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


class RequestIdMiddleware:
    """Gives each request an id (the client's own if it is sane), on the reply and in every log line."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = time.monotonic()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            finally:
                _log.info(
                    "request",
                    method=scope["method"][:20],
                    path=scope["path"][:200],
                    status=status,
                    seconds=round(time.monotonic() - started, 3),
                )


class HostGuardMiddleware:
    """Keeps web pages from driving the server, also by DNS rebinding (CVE-2024-28224).

    A request must name an allowed host. Browsers add an Origin when a page of another site sends the
    request; such an origin must be allowed by name. `*` in either list allows any.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Sequence[str], allowed_origins: Sequence[str]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in allowed_hosts)
        self._origins = frozenset(origin.lower().rstrip("/") for origin in allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        problem = self._problem(Headers(scope=scope), scope["scheme"])
        if problem is None:
            await self._app(scope, receive, send)
        else:
            await error_response(problem)(scope, receive, send)

    def _problem(self, headers: Headers, scheme: str) -> ApiError | None:
        host = headers.get("host", "")
        if not self._allows_host(host):
            return ForbiddenError(
                f"The host {host[:100]!r} is not allowed. If it is this server's, name it in allowed_hosts.",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is None or self._allows_origin(origin.lower(), host.lower(), scheme):
            return None
        return ForbiddenError(
            f"Web pages of {origin[:100]!r} may not call this server unless cors_origins names them.",
            code="origin_not_allowed",
        )

    def _allows_host(self, host: str) -> bool:
        if "*" in self._hosts:
            return True
        parsed = _HOST_AND_PORT.fullmatch(host)
        if parsed is None:
            return False
        name = parsed["name"].lower()
        return name in self._hosts or any(
            allowed.startswith("*.") and name.endswith(allowed[1:]) for allowed in self._hosts
        )

    def _allows_origin(self, origin: str, host: str, scheme: str) -> bool:
        if "*" in self._origins or origin in self._origins:
            return True
        origin_scheme, _, origin_host = origin.partition("://")
        # A proxy that ends TLS speaks http to us, so that only the names and ports can be compared.
        return bool(origin_host) and _with_port(origin_host, origin_scheme) in {
            _with_port(host, scheme),
            _with_port(host, origin_scheme),
        }


def _with_port(host: str, scheme: str) -> tuple[str, str | None]:
    parsed = _HOST_AND_PORT.fullmatch(host)
    if parsed is None:
        return host, None
    return parsed["name"], parsed["port"] or _DEFAULT_PORTS.get(scheme)


class UnexpectedErrorMiddleware:
    """Logs what nobody expected and answers without a word of it; a reply that has begun is cut."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except Exception as error:
            _log.exception("unexpected_error")
            if started:
                raise
            await error_response(error)(scope, receive, send)
