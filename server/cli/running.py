"""Runs the application under uvicorn: start, readiness, stop. Main thread.

Until the server is ready an interrupt ends the process at once: nothing was promised to anybody. Then the
first one (or SIGTERM) lets requests in flight finish for `shutdown_timeout_seconds`, and a second Ctrl-C ends
the process at once. Knows nothing of models: what stops a start is an exception of the application's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, MutableMapping, Sequence
from types import FrameType
from typing import Any, NoReturn

import structlog
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from server.settings import Settings

__all__ = ["StartError", "end_process", "run"]


_log = structlog.get_logger(__name__)


def end_process(code: int) -> NoReturn:
    """End the process here and now, with everything written out.

    Python's own way out waits for a thread that loads a model, and can abort the process while a thread that
    used MLX is still giving up what it has: that goes on after the thread can be joined.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class StartError(Exception):
    """The application did not start; `__cause__` says why."""


def run(
    app: ASGIApp,
    settings: Settings,
    sockets: Sequence[socket.socket],
    *,
    on_ready: Callable[[], None],
    on_end: Callable[[], None],
    say: Callable[[str], None],
) -> None:
    """Serve `app` on bound sockets until a signal; returns after a graceful stop.

    `on_ready` is called once requests are answered, `on_end` before the process is ended at once by a signal.
    Raises: StartError; OSError if the sockets cannot be listened on.
    """
    watched = _Watched(app)
    config = uvicorn.Config(
        watched,
        log_config=None,
        access_log=False,
        lifespan="on",
        ws="none",
        proxy_headers=False,
        server_header=False,
        # Longer than clients keep an idle connection, so that none is closed under a request on its way.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=settings.shutdown_timeout_seconds,
    )
    server = _Server(config, on_ready, on_end, say)
    try:
        server.run(sockets=list(sockets))
    except SystemExit:
        raise StartError("the application did not start") from watched.failure


class _Watched:
    """The application, with what uvicorn would tell at length told shortly.

    Keeps the exception that a start ends in, of which ASGI would pass on the text alone; logs one line for a
    request that is cut off by a stop, which is what a cancellation from uvicorn means.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.failure: Exception | None = None
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            _log.warning("request_cut_off", reason="the server stops", path=scope.get("path"))

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
        on_ready: Callable[[], None],
        on_end: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._on_end = on_end
        self._say = say

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come. Unlike uvicorn's own, a graceful stop is not followed by dying of the signal."""
        if not self.started or (self.should_exit and sig == signal.SIGINT):
            self._on_end()
            end_process(128 + sig)
        if not self.should_exit:
            self.should_exit = True
            seconds = self.config.timeout_graceful_shutdown
            self._say(f"Stopping: requests in flight have {seconds} s to finish; Ctrl-C again stops at once.")
