"""Runs the application under uvicorn: start, readiness, stop. Main thread.

Until the server is ready an interrupt ends the process at once: nothing was promised to anybody. Then the
first one (or SIGTERM, or SIGHUP unless it was ignored from the start, as under nohup) lets requests in flight
finish for `shutdown_timeout_seconds`, after which those that are still being computed end with an error of
their own; a second Ctrl-C ends the process at once. Knows nothing of models: what stops a start is an
exception of the application's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from functools import partial
from types import FrameType
from typing import Any, NoReturn, cast

import structlog
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.connections import Connection, Connections
from server.errors import ServerStoppingError, error_response
from server.settings import Settings

__all__ = ["ENGINE_DIED", "StartError", "end_process", "run"]

ENGINE_DIED = os.EX_SOFTWARE
"""The exit code of a server whose generation thread ended by itself: only a new process mends that."""


# What requests that were given up have to send their errors, before their connections are cut.
_LAST_WORDS_SECONDS = 2

# What requests have to fail by themselves once the engine gave up, before they are cut off.
_OWN_WORDS_SECONDS = 0.2

# What the application has to put its things in order. What goes on longer, such as a blend, is left behind:
# no work is acknowledged before it is done.
_CLEAN_UP_SECONDS = 5

# How often it is told that connections cannot be accepted.
_TOLD_EVERY_SECONDS = 10.0

_log = structlog.get_logger(__name__)


def end_process(code: int) -> NoReturn:
    """End the process here and now, with everything written out that can be.

    Python's own way out waits for a thread that loads a model, and can abort the process while a thread that
    used MLX is still giving up what it has: that goes on after the thread can be joined.
    """
    for flush in (logging.shutdown, sys.stdout.flush, sys.stderr.flush):
        # A signal comes in the middle of anything: what is being written just then cannot be flushed.
        with contextlib.suppress(RuntimeError, OSError, ValueError):
            flush()
    os._exit(code)


class StartError(Exception):
    """The application did not start; `__cause__` says why."""


def run(
    app: ASGIApp,
    settings: Settings,
    connections: Connections,
    sockets: Sequence[socket.socket],
    *,
    backlog: int,
    on_ready: Callable[[], None],
    give_up: Callable[[], Awaitable[None]],
    died: Callable[[], Awaitable[None]],
    on_end: Callable[[], None],
    say: Callable[[str], None],
) -> int:
    """Serve `app` on bound sockets until a signal; returns the exit code after a graceful stop.

    `connections` are what it admits; `backlog` connections may wait to be accepted, and are accepted at once.
    `on_ready` is called once requests are answered; `give_up` when the time of those in flight is up, to end
    what is still being computed, each with an error; `on_end` before a signal ends the process at once. When
    `died` returns, nothing can be answered any more: the server stops, and the code is ENGINE_DIED.
    Raises: StartError; OSError if the sockets cannot be listened on.
    """
    watched = _Watched(app)
    config = uvicorn.Config(
        watched,
        log_config=None,
        access_log=False,
        lifespan="on",
        http=partial(Connection, connections),  # pyright: ignore[reportArgumentType] (made like a class)
        ws="none",
        backlog=backlog,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=settings.idle_timeout_seconds,
        timeout_graceful_shutdown=settings.shutdown_timeout_seconds + _LAST_WORDS_SECONDS,
    )

    async def give_all_up() -> None:
        await give_up()
        await asyncio.sleep(_OWN_WORDS_SECONDS)
        watched.cut_off_unanswered()

    server = _Server(config, settings.shutdown_timeout_seconds, on_ready, give_all_up, died, on_end, say)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, server.handle_exit)
    try:
        server.run(sockets=list(sockets))
    except SystemExit:
        raise StartError("the application did not start") from watched.failure
    return server.exit_code


class _Watched:
    """The application, with what uvicorn would tell at length told shortly.

    Keeps the exception that a start ends in, of which ASGI would pass on the text alone; answers a request
    that is cut off by a stop, which is what a cancellation from uvicorn means, and logs one line for it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.failure: Exception | None = None
        self._app = app
        self._unanswered: set[asyncio.Task[Any]] = set()

    def cut_off_unanswered(self) -> None:
        """End the requests of which no answer has begun; each is answered with 503."""
        for task in self._unanswered:
            task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._unanswered.add(task)

        async def send_and_note(message: Message) -> None:
            self._unanswered.discard(task)
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except asyncio.CancelledError:
            _log.warning("request_cut_off", reason="the server stops", path=scope["path"][:200])
            if task not in self._unanswered:
                return
            reply = error_response(ServerStoppingError())
            reply.headers["connection"] = "close"
            reply.headers["x-request-id"] = scope.get("state", {}).get("request_id", "")
            await reply(scope, receive, send)
        finally:
            self._unanswered.discard(task)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            started = started or message["type"] == "lifespan.startup.complete"
            if message["type"] == "lifespan.startup.failed":
                message = {"type": message["type"], "message": ""}
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception as error:
            if started:
                raise
            self.failure = error
            # Whoever catches StartError says more than uvicorn's "Application startup failed".
            logging.getLogger("uvicorn.error").disabled = True
            await send({"type": "lifespan.startup.failed", "message": ""})


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        finish_seconds: float,
        on_ready: Callable[[], None],
        give_up: Callable[[], Awaitable[None]],
        died: Callable[[], Awaitable[None]],
        on_end: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._died = died
        self._watch: asyncio.Task[None] | None = None
        self._finish_seconds = finish_seconds
        self._on_ready = on_ready
        self._give_up = give_up
        self._on_end = on_end
        self._say = say

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(_tell_failure())
        await super().startup(sockets=sockets)
        self._watch = asyncio.create_task(self._end_when_dead())
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        giving_up = asyncio.create_task(self._give_up_late())
        try:
            async with asyncio.timeout(self._finish_seconds + _LAST_WORDS_SECONDS + _CLEAN_UP_SECONDS):
                await super().shutdown(sockets=sockets)
        except TimeoutError:
            _log.warning("work_left_behind", reason="it did not end in time")
            self._on_end()
            end_process(self.exit_code)
        finally:
            if self._watch is not None:
                self._watch.cancel()
            giving_up.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await giving_up

    async def _end_when_dead(self) -> None:
        await self._died()
        _log.critical("server_ends", reason="the generation thread has ended", exit_code=ENGINE_DIED)
        self.exit_code = ENGINE_DIED
        self.should_exit = True

    async def _give_up_late(self) -> None:
        await asyncio.sleep(self._finish_seconds)
        await self._give_up()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come. Unlike uvicorn's own, a graceful stop is not followed by dying of the signal."""
        if not self.started or (self.should_exit and sig == signal.SIGINT):
            with contextlib.suppress(RuntimeError):  # as in end_process
                self._on_end()
            end_process(128 + sig)
        if not self.should_exit:
            self.should_exit = True
            seconds = self._finish_seconds
            text = f"Stopping: requests in flight have {seconds} s to finish; Ctrl-C again stops at once."
            # Not from here: a line of the log may be being written.
            asyncio.get_running_loop().call_soon_threadsafe(self._say, text)


def _tell_failure() -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """A handler of the event loop's own errors, for when it can accept no connections.

    asyncio tries as often as the backlog is long before it waits a second, and tells of each failure.
    """
    told_seconds = -math.inf

    def tell(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal told_seconds
        if not str(context.get("message", "")).startswith("socket.accept()"):
            loop.default_exception_handler(context)
        elif loop.time() - told_seconds >= _TOLD_EVERY_SECONDS:
            told_seconds = loop.time()
            _log.error("connections_cannot_be_accepted", error=repr(context.get("exception")))

    return tell
