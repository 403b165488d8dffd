"""Child processes are always ended, with their children, however the block that started them ends."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from benchmarks.processes import Child, ProcessError, child_process, free_port, wait_until_ready

# It and its own child each say that they are up and then wait. Both hold the standard output, which therefore
# ends when both have ended.
PARENT = """
import signal, subprocess, sys
if sys.argv[1:] == ["deaf"]:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import signal; print('up', flush=True); signal.pause()"])
print("up", flush=True)
signal.pause()
"""


def python(tmp_path: Path, code: str, *arguments: str, speaks: bool = False, stop_seconds: float = 10):
    return child_process(
        "child",
        [sys.executable, "-c", code, *arguments],
        tmp_path / "log",
        cwd=tmp_path,
        environment=os.environ,
        speaks=speaks,
        stop_seconds=stop_seconds,
    )


async def started(child: Child) -> None:
    """Return once PARENT and its child are up."""
    assert child.process.stdout is not None
    assert [await child.process.stdout.readline() for _ in range(2)] == [b"up\n", b"up\n"]


async def ended(child: Child) -> bool:
    """Whether PARENT has been waited for and nobody is left who could write to its standard output."""
    assert child.process.stdout is not None
    async with asyncio.timeout(60):
        return await child.process.stdout.read() == b"" and child.process.returncode is not None


@pytest.mark.parametrize("arguments", [(), ("deaf",)])
async def test_the_block_ends_the_process_and_its_children(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    async with python(tmp_path, PARENT, *arguments, speaks=True, stop_seconds=0.2) as child:
        await started(child)
    assert await ended(child)


async def test_an_error_ends_them_too(tmp_path: Path) -> None:
    children: list[Child] = []

    async def fail() -> None:
        async with python(tmp_path, PARENT, speaks=True) as child:
            children.append(child)
            await started(child)
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    assert await ended(children[0])


async def test_a_cancellation_ends_them_too(tmp_path: Path) -> None:
    up: asyncio.Future[Child] = asyncio.get_running_loop().create_future()

    async def hold() -> None:
        async with python(tmp_path, PARENT, speaks=True) as child:
            await started(child)
            up.set_result(child)
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    child = await up
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await ended(child)


async def test_ready_means_that_the_url_answers_200(tmp_path: Path) -> None:
    port = free_port()
    code = (
        "import http.server, sys\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    seen = 0\n"
        "    def do_GET(self):\n"
        "        Handler.seen += 1\n"
        "        self.send_response(200 if Handler.seen == 3 else 503)\n"
        "        self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()\n"
    )
    async with python(tmp_path, code, str(port)) as child:
        await wait_until_ready(child, f"http://127.0.0.1:{port}/ready", 60)
        assert (tmp_path / "log").read_text().count('"GET /ready HTTP/1.1" 503') == 2


async def test_a_child_that_ends_early_is_shown_with_its_log(tmp_path: Path) -> None:
    async with python(tmp_path, "import sys; print('no such model'); sys.exit(3)") as child:
        with pytest.raises(ProcessError, match=r"(?s)child: .*exit code 3.*no such model"):
            await wait_until_ready(child, f"http://127.0.0.1:{free_port()}/", 60)


async def test_a_child_that_never_answers_is_given_up(tmp_path: Path) -> None:
    async with python(tmp_path, "import signal; signal.pause()") as child:
        with pytest.raises(ProcessError, match=r"ready within 0\.2 seconds; it is still running"):
            await wait_until_ready(child, f"http://127.0.0.1:{free_port()}/", 0.2)


async def test_a_program_that_does_not_exist_is_an_error_with_its_name(tmp_path: Path) -> None:
    starting = child_process("child", ["./none"], tmp_path / "log", cwd=tmp_path, environment={})
    with pytest.raises(ProcessError, match=r"expected to start \./none"):
        await starting.__aenter__()
