"""The load generator against a real socket server that answers as it is told, byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest

from benchmarks.load import LoadError, run_load

Respond = Callable[[asyncio.StreamWriter, dict], Awaitable[None]]

HEADERS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def event(**values: object) -> bytes:
    return f"data: {json.dumps(values)}\n\n".encode()


def delta(text: str | None) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}])


def usage(completion_tokens: int, **details: object) -> bytes:
    counts = {"prompt_tokens": 7, "completion_tokens": completion_tokens, "prompt_tokens_details": details}
    return event(choices=[], usage=counts)


DONE = b"data: [DONE]\n\n"


@contextlib.asynccontextmanager
async def serving(respond: Respond) -> AsyncIterator[str]:
    """A server that reads one request per connection and lets `respond` write whatever it likes."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.partition("content-length:")[2].split("\r\n")[0])
            await respond(writer, json.loads(await reader.readexactly(length)))
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield f"http://{host}:{port}"


def saying(*parts: bytes) -> Respond:
    async def respond(writer: asyncio.StreamWriter, body: dict) -> None:
        writer.write(b"".join(parts))
        await writer.drain()

    return respond


async def load(
    respond: Respond,
    bodies: Sequence[dict] = ({},),
    timeout_seconds: float = 20,
    in_flight: int | None = None,
    heard: Callable[[int], None] = lambda index: None,
):
    async with serving(respond) as url:
        return await run_load(url, bodies, timeout_seconds, in_flight=in_flight, heard=heard, max_retries=3)


async def test_counts_come_from_usage() -> None:
    parts = (delta(None), delta("Once "), delta("upon"), usage(24, cached_tokens=5), DONE)
    result = await load(saying(HEADERS, *parts))
    (answer,) = result.answers
    assert (answer.text, answer.completion_tokens, answer.prompt_tokens) == ("Once upon", 24, 7)
    assert (answer.cached_tokens, answer.retries) == (5, 0)
    assert 0 < answer.first_token_seconds <= answer.seconds <= result.seconds
    assert len(answer.gap_seconds) == 1
    assert result.tokens_per_second == pytest.approx(24 / result.seconds)


async def test_the_first_token_is_the_first_text() -> None:
    pause_seconds = 0.2  # what is measured here, not a wait for something

    async def respond(writer: asyncio.StreamWriter, body: dict) -> None:
        writer.write(HEADERS + b": keepalive 1/2\n\n" + delta(""))
        for part in (delta("a"), delta("b") + usage(2) + DONE):
            await writer.drain()
            await asyncio.sleep(pause_seconds)
            writer.write(part)
        await writer.drain()

    times: list[float] = []
    (answer,) = (await load(respond, heard=lambda index: times.append(time.perf_counter()))).answers
    assert len(times) == 2
    assert answer.first_token_seconds >= pause_seconds * 0.9
    assert answer.gap_seconds[0] == pytest.approx(times[1] - times[0], abs=pause_seconds / 2)
    assert answer.seconds - answer.first_token_seconds >= pause_seconds * 0.5


async def test_all_requests_are_in_flight_at_once_as_streams_with_usage() -> None:
    everyone = asyncio.Barrier(5)
    seen: list[dict] = []

    async def respond(writer: asyncio.StreamWriter, body: dict) -> None:
        seen.append(body)
        await everyone.wait()
        await saying(HEADERS, delta(body["model"]), usage(3), DONE)(writer, body)

    result = await load(respond, [{"model": str(index)} for index in range(5)])
    assert [answer.text for answer in result.answers] == ["0", "1", "2", "3", "4"]
    assert result.completion_tokens == 15
    assert all(body["stream"] and body["stream_options"] == {"include_usage": True} for body in seen)


async def test_so_many_are_in_flight_and_the_next_begins_when_one_ends() -> None:
    now, most, both = 0, 0, asyncio.Barrier(2)

    async def respond(writer: asyncio.StreamWriter, body: dict) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        if body["number"] < 2:
            await both.wait()
        now -= 1
        writer.write(HEADERS + delta(str(body["number"])) + usage(1) + DONE)
        await writer.drain()

    result = await load(respond, [{"number": index} for index in range(7)], in_flight=2)
    assert [answer.text for answer in result.answers] == list("0123456")
    assert most == 2
    first, *later = sorted(answer.started_seconds for answer in result.answers)
    assert first < later[-1] <= result.seconds


async def test_a_reset_connection_is_tried_again_and_counted() -> None:
    attempts = 0

    async def respond(writer: asyncio.StreamWriter, body: dict) -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            return reset(writer)
        await saying(HEADERS, delta("x"), usage(1), DONE)(writer, body)

    (answer,) = (await load(respond)).answers
    assert (answer.retries, answer.text) == (2, "x")


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset instead of an end."""
    now = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)


async def test_it_gives_up_on_a_server_that_always_resets() -> None:
    async def respond(writer: asyncio.StreamWriter, body: dict) -> None:
        reset(writer)

    with pytest.raises(LoadError, match="refused or reset 4 times"):
        await load(respond)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((b"HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\nno such model",), "404.*no such model"),
        ((HEADERS, delta("a"), DONE), "ends with usage"),
        ((HEADERS, delta("a"), usage(0), DONE), "at least one token"),
        ((HEADERS, delta("a"), usage(1)), r"no \[DONE\]"),
        ((HEADERS, delta("a"), event(error={"message": "out of memory"})), "out of memory"),
        (
            (HEADERS.replace(b"close\r\n", b"close\r\nContent-Length: 9999\r\n"), delta("a")),
            "broke off",
        ),
    ],
)
async def test_an_answer_that_is_not_whole_fails_the_load(parts: tuple[bytes, ...], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        await load(saying(*parts))


async def test_a_load_that_takes_too_long_fails() -> None:
    never = asyncio.Event()

    async def respond(writer: asyncio.StreamWriter, body: dict) -> None:
        writer.write(HEADERS + delta("a"))
        await writer.drain()
        await never.wait()

    with pytest.raises(LoadError, match=r"within 0\.3 seconds|broke off"):
        await load(respond, timeout_seconds=0.3)
