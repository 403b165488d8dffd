"""What is taken of requests' bodies: how large one may be, and all together, and how long one may take.

Plain ASGI; knows no route, no key and no server. A body is taken while the application asks for it, so that
one that nobody asks for costs nothing. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, BodyTimeoutError, BodyTooLargeError, OverloadedError

__all__ = ["BodyLimits", "BodyMiddleware"]

# So much of each body is not counted with the others, so that large ones do not keep small ones out; as many
# connections as there may be bound it.
_UNCOUNTED_BYTES = 64 * 1024

# So much of a body that nobody asks for is still read, and for so long: a client that is cut off while it
# writes may never see the answer.
_LINGER_BYTES = 256 * 1024
_LINGER_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """`body_bytes` of one, `memory_bytes` of all that are held, `seconds` from a head to a body's end."""

    body_bytes: int
    memory_bytes: int
    seconds: float


class BodyMiddleware:
    """Refuses bodies beyond the limits (413, 503, 408), and closes connections of which a body is half read.

    A body counts from its first byte until the answer begins: then it has become something else.
    """

    def __init__(self, app: ASGIApp, limits: BodyLimits) -> None:
        self._app = app
        self._limits = limits
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(Headers(scope=scope), receive)
        ends_seconds = asyncio.get_running_loop().time() + self._limits.seconds
        counted_bytes = 0
        closes = False

        def count(size_bytes: int) -> None:
            nonlocal counted_bytes
            self._held_bytes += size_bytes - counted_bytes
            counted_bytes = size_bytes

        async def receive_within_limits() -> Message:
            if body.whole:
                return await receive()
            if body.declared_bytes > self._limits.body_bytes:
                raise BodyTooLargeError(self._limits.body_bytes)
            try:
                async with asyncio.timeout_at(ends_seconds):
                    message = await body.next()
            except TimeoutError:
                raise BodyTimeoutError(self._limits.seconds) from None
            if body.taken_bytes > self._limits.body_bytes:
                raise BodyTooLargeError(self._limits.body_bytes)
            count(max(0, body.taken_bytes - _UNCOUNTED_BYTES))
            if self._held_bytes > self._limits.memory_bytes:
                raise _too_much_held()
            return message

        async def send_and_close(message: Message) -> None:
            nonlocal closes
            if message["type"] == "http.response.start":
                count(0)
                await body.take_what_is_there()
                if not body.whole:
                    closes = True
                    MutableHeaders(scope=message)["connection"] = "close"
            if not closes or message["type"] != "http.response.body" or message.get("more_body", False):
                await send(message)
                return
            await send({**message, "more_body": True})
            await body.linger()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await self._app(scope, receive_within_limits, send_and_close)
        finally:
            count(0)


class _Body:
    """A request's body on its way; `whole` once nothing more of it can come, also because the client left."""

    def __init__(self, headers: Headers, receive: Receive) -> None:
        declared = headers.get("content-length", "0")
        self.declared_bytes = int(declared) if declared.isdecimal() and len(declared) <= 18 else sys.maxsize
        self.taken_bytes = 0
        self.whole = False
        # Asking for such a body invites the client to send it.
        self._waits_for_invitation = "expect" in headers
        self._receive = receive

    async def next(self) -> Message:
        """The next message of the body, or that the client has left."""
        message = await self._receive()
        self._waits_for_invitation = False
        self.taken_bytes += len(message.get("body", b""))
        self.whole = not message.get("more_body", False)
        return message

    async def take_what_is_there(self) -> None:
        """Drop what has come already and was not asked for; waits for nothing."""
        await self._drop(_UNCOUNTED_BYTES, 0.0)

    async def linger(self) -> None:
        """Drop what still comes, so much of it and for so long."""
        await self._drop(_LINGER_BYTES, _LINGER_SECONDS)

    async def _drop(self, size_bytes: int, seconds: float) -> None:
        most_bytes = self.taken_bytes + size_bytes
        try:
            async with asyncio.timeout(seconds):
                while not (self.whole or self._waits_for_invitation or self.taken_bytes > most_bytes):
                    await self.next()
        except TimeoutError:
            pass


def _too_much_held() -> ApiError:
    return OverloadedError(
        "The server holds as much of requests' bodies as it may; try again later.",
        code="body_memory_exceeded",
    )
