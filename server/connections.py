"""The server's connections: how many there may be, how long each may wait, and what is no HTTP on them.

`Connection` is uvicorn's protocol over h11, whose own limits are that of an idle connection alone. Knows no
routes and no bodies; what it refuses never becomes a request. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import h11
import structlog
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.errors import ApiError, OverloadedError

__all__ = ["MAX_HEAD_BYTES", "REFUSALS", "Connection", "ConnectionLimits", "Connections", "Parser"]

_log = structlog.get_logger(__name__)

REFUSALS = ("too_many_connections", "idle_cut", "head_timeout", "not_http")
"""Why a connection is refused or cut: there are too many, also of others; it is too slow; it is no HTTP."""

LOGGER = "uvicorn.connections"
"""Its warnings are a line for each request that is no HTTP, of which `Connections` tells in fewer."""

MAX_HEAD_BYTES = 32 * 1024

# So many chunks that are smaller than this may come one after the other; larger ones make up for them.
_SMALL_CHUNK_BYTES = 64
_MOST_SMALL_CHUNKS = 1024

# A flood of refusals makes one line of the log in so many seconds, for each reason.
_TOLD_EVERY_SECONDS = 10.0

_BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
_FOLDED_LINE = re.compile(rb"\n[ \t]")
_LENGTH = re.compile(rb"\ncontent-length[ \t]*:[ \t]*([^\r\n]*?)[ \t]*\r", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """`connections` at once; `head_seconds` from a connection's, or a head's, first byte to a head's end."""

    connections: int
    head_seconds: float


class Connections:
    """All connections that are open, those that wait for a request, and how many were refused by what."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.refused: Counter[str] = Counter()
        self._open: set[Connection] = set()
        self._waiting: dict[Connection, None] = {}  # the one that has waited longest comes first
        self._told_seconds: dict[str, float] = {}

    @property
    def open(self) -> int:
        """How many there are."""
        return len(self._open)

    @property
    def waiting(self) -> int:
        """How many of them have no request under way."""
        return len(self._waiting)

    def admit(self, connection: Connection) -> bool:
        """Take a new one in. If there are as many as may be, the one that has waited longest has to go."""
        if len(self._open) >= self.limits.connections:
            longest = next(iter(self._waiting), None)
            if longest is None:
                return False
            longest.cut("idle_cut")
        self._open.add(connection)
        self._waiting[connection] = None
        return True

    def waits(self, connection: Connection, waiting: bool) -> None:
        """Whether one that is open waits for a request from now on."""
        if not waiting:
            self._waiting.pop(connection, None)
        elif connection in self._open:
            self._waiting.setdefault(connection)

    def forget(self, connection: Connection) -> None:
        """Let one go that is closed, or about to be."""
        self._open.discard(connection)
        self._waiting.pop(connection, None)

    def count_refusal(self, reason: str) -> None:
        """Count a refusal; not each makes a line of the log."""
        self.refused[reason] += 1
        now = time.monotonic()
        if now - self._told_seconds.get(reason, -_TOLD_EVERY_SECONDS) >= _TOLD_EVERY_SECONDS:
            self._told_seconds[reason] = now
            _log.warning("connections_refused", reason=reason, total=self.refused[reason], open=self.open)


class Parser(h11.Connection):
    """h11, without what it understands and another server before it might understand otherwise.

    Two parsers that disagree on where a request ends take a part of it for a request of its own (RFC 9112,
    11.2). `problem` is what stopped it.
    """

    problem: h11.RemoteProtocolError | None = None
    _small_chunks_bytes = 0

    def next_event(self) -> Any:
        """The next event, as h11 has it.

        Raises:
            RemoteProtocolError: what came is not HTTP, or not beyond doubt.
        """
        unread = self.trailing_data[0] if self.their_state is h11.IDLE else b""
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check_head(unread[: len(unread) - len(self.trailing_data[0])], event)
                self._small_chunks_bytes = 0
            elif isinstance(event, h11.Data) and event.chunk_end:
                self._check_chunk(event)
        except h11.RemoteProtocolError as error:
            self.problem = error
            raise
        return event

    def _check_chunk(self, data: h11.Data) -> None:
        """Refuse a body of single bytes: parsing a small chunk takes as long as parsing a large one."""
        self._small_chunks_bytes = max(0, self._small_chunks_bytes + _SMALL_CHUNK_BYTES - len(data.data))
        if self._small_chunks_bytes > _MOST_SMALL_CHUNKS * _SMALL_CHUNK_BYTES:
            raise h11.RemoteProtocolError("the body comes in too many small chunks")


def _check_head(head: bytes, request: h11.Request) -> None:
    names = {name for name, _ in request.headers}
    lengths = _LENGTH.findall(head)
    if len(head) > MAX_HEAD_BYTES:
        raise h11.RemoteProtocolError("the head is too long", error_status_hint=431)
    if not request.http_version.startswith(b"1."):
        raise h11.RemoteProtocolError("the version of HTTP is not 1.0 or 1.1", error_status_hint=505)
    if _BARE_LINE_FEED.search(head):
        raise h11.RemoteProtocolError("a line of the head ends without a carriage return")
    if _FOLDED_LINE.search(head):
        raise h11.RemoteProtocolError("a header is folded over several lines")
    if len(lengths) > 1 or not all(length.isdigit() for length in lengths):
        raise h11.RemoteProtocolError("Content-Length is not one number")
    if b"transfer-encoding" in names and (lengths or request.http_version == b"1.0"):
        raise h11.RemoteProtocolError("Transfer-Encoding comes with Content-Length, or in HTTP/1.0")


class Connection(H11Protocol):
    """One connection, as uvicorn makes it: `functools.partial(Connection, connections)`."""

    def __init__(self, connections: Connections, **given: Any) -> None:
        super().__init__(**given)
        self.logger = logging.getLogger(LOGGER)
        self.conn: Parser = Parser(h11.SERVER, MAX_HEAD_BYTES)
        self._all = connections
        self._head_timer: asyncio.TimerHandle | None = None

    # What uvicorn and asyncio call

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if not self._all.admit(self):
            self._all.count_refusal("too_many_connections")
            self._refuse(OverloadedError("The server has as many connections as it may have."))
            return
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._all.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def send_400_response(self, msg: str) -> None:
        """What came is not HTTP; also in the middle of a body, while the application waits for it."""
        problem = self.conn.problem
        self._all.count_refusal("not_http")
        status = 400 if problem is None else problem.error_status_hint
        text = msg if problem is None else f"The request is not valid HTTP: {problem}."
        self._refuse(ApiError(status, text, code="invalid_http"))

    def _should_upgrade(self) -> bool:
        return False

    # Waiting

    def _look(self) -> None:
        """Find out whether a request is waited for, and since when, after anything has happened."""
        if self.transport.is_closing():
            return
        waiting = self.cycle is None or self.cycle.response_complete
        self._all.waits(self, waiting)
        if not waiting:
            self._stop_head_timer()
        elif self.timeout_keep_alive_task is None or self.conn.trailing_data[0]:
            self._start_head_timer()  # else uvicorn's own timer of idle connections runs

    def _start_head_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._all.limits.head_seconds, self._give_up_waiting)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up_waiting(self) -> None:
        self._all.count_refusal("head_timeout")
        if self.conn.trailing_data[0]:
            seconds = self._all.limits.head_seconds
            text = f"The request's head did not come within {seconds:g} s."
            self._refuse(ApiError(408, text, code="head_timeout"))
        else:
            self.cut()

    # Ending

    def cut(self, reason: str | None = None) -> None:
        """Close the connection without a word."""
        if reason is not None:
            self._all.count_refusal(reason)
        self._all.forget(self)
        self._stop_head_timer()
        self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer what has not become a request, or stopped being one, if that can be done yet, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            body = json.dumps(error.body()).encode()
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
                "x-request-id": f"req_{uuid.uuid4().hex}",
                **{name.lower(): value for name, value in error.headers.items()},
            }
            for event in (
                h11.Response(
                    status_code=error.status,
                    headers=list(headers.items()),
                    reason=HTTPStatus(error.status).phrase.encode(),
                ),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.cut()
