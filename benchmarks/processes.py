"""Child processes: started, waited for until ready, and always ended, with all that they started.

Each child leads a process group of its own, which is ended as a whole when the block that started it ends in
any way. Knows no server in particular. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

__all__ = ["Child", "ProcessError", "child_process", "free_port", "wait_until_ready"]

_POLL_SECONDS = 0.1
_LOG_TAIL_CHARACTERS = 2000


class ProcessError(Exception):
    """A child that did not start, ended too early or cannot be talked to; the message ends with its log."""


@dataclass(frozen=True, slots=True)
class Child:
    """A running child. What it prints goes to `log_path`, with `speaks` only its standard error."""

    name: str
    process: Process
    log_path: Path

    def failure(self, what: str) -> ProcessError:
        """An error that says `what` went wrong and shows the end of the log."""
        tail = self.log_path.read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:].strip()
        ended = self.process.returncode
        state = "it is still running" if ended is None else f"it ended with exit code {ended}"
        return ProcessError(f"{self.name}: {what}; {state}. The end of its log:\n{tail or '(empty)'}")


@contextlib.asynccontextmanager
async def child_process(
    name: str,
    command: Sequence[str],
    log_path: Path,
    *,
    cwd: Path,
    environment: Mapping[str, str],
    speaks: bool = False,
    stop_seconds: float = 10,
) -> AsyncIterator[Child]:
    """Run `command` for as long as the block; `speaks` opens pipes to its standard input and output.

    Leaving the block asks the whole process group to end (SIGTERM), and ends it after `stop_seconds`.

    Raises: ProcessError if it cannot be started.
    """
    with log_path.open("wb") as log:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=PIPE if speaks else DEVNULL,
                stdout=PIPE if speaks else log,
                stderr=log if speaks else STDOUT,
                cwd=cwd,
                env=dict(environment),
                start_new_session=True,
                limit=1 << 24,  # bytes of one line of its answers
            )
        except OSError as error:
            raise ProcessError(f"{name}: expected to start {command[0]}, got: {error}") from error
    try:
        yield Child(name, process, log_path)
    finally:
        await _end(process, stop_seconds)


async def _end(process: Process, stop_seconds: float) -> None:
    try:
        _signal_group(process, signal.SIGTERM)
        async with asyncio.timeout(stop_seconds):
            await process.wait()
    except TimeoutError:
        pass  # what is left is ended below
    finally:
        # The group may outlive its leader, and a second interrupt may cut the waiting short.
        _signal_group(process, signal.SIGKILL)
    await process.wait()


def _signal_group(process: Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


async def wait_until_ready(child: Child, url: str, timeout_seconds: float) -> None:
    """Return once `url` answers 200.

    Raises: ProcessError if the child ends before, or the time is up.
    """
    try:
        async with asyncio.timeout(timeout_seconds), httpx.AsyncClient(trust_env=False) as client:
            while child.process.returncode is None:
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(url)).status_code == httpx.codes.OK:
                        return
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError:
        raise child.failure(f"expected it to be ready within {timeout_seconds:g} seconds") from None
    raise child.failure("expected it to become ready")


def free_port() -> int:
    """A TCP port on 127.0.0.1 that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
