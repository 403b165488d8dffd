"""Slow and endless heads and bodies, and too many connections: a real server stays as quick and as small."""

from __future__ import annotations

import time

import pytest

from tests.e2e.running import Served, until

from .conftest import Connect
from .sockets import CHAT, KEY, MIB, Wire, chat_head, head, open_files, resident_mib

EARLY, LATE = 0.9, 15.0
"""Seconds around limits of 1 and 2 s, with much patience for a busy machine."""


def refusals(server: Served, reason: str) -> int:
    line = f'graft_refused_connections_total{{reason="{reason}"}} '
    return int(float(server.http.get("/metrics").text.split(line)[1].split("\n")[0]))


def check_health(connect: Connect) -> None:
    """A new connection is answered."""
    wire = connect()
    wire.send(head("GET", "/health", "Connection: close"))
    assert wire.read()[:15] == b"HTTP/1.1 200 OK", wire.got


def trickle(wire: Wire, rest: bytes) -> None:
    """Send a byte now and then, until the other end has had enough."""
    ends = time.monotonic() + LATE
    for byte in rest:
        if wire.closed or time.monotonic() > ends or not wire.send(bytes([byte])):
            break
        wire.read(0.1)


@pytest.mark.parametrize(
    ("start", "code"),
    [
        (head()[:20], b"head_timeout"),
        (head()[:-2], b"head_timeout"),
        (head(*("GET", "/health"), "X-A: b") + head()[:20], b"head_timeout"),
        (chat_head("Content-Length: 1000"), b"body_timeout"),
        (chat_head("Content-Length: 1000") + b"{", b"body_timeout"),
        (chat_head("Transfer-Encoding: chunked") + b"5\r\n{", b"body_timeout"),
        (b"", b""),
    ],
)
def test_what_is_half_sent_is_cut(limited: Served, connect: Connect, start: bytes, code: bytes) -> None:
    wires = [connect() for _ in range(20)]
    for wire in wires:
        wire.send(start)
    for wire in wires:
        wire.read(LATE)
    cut = [round(wire.seconds, 2) for wire in wires if wire.closed]
    assert len(cut) == 20, f"{len(cut)} of 20 connections were cut within {LATE} s"
    assert min(cut) > EARLY, f"cut after {cut} s"
    assert all(code in wire.got and (b" 408 " in wire.got) == bool(code) for wire in wires), wires[0].got


@pytest.mark.parametrize(
    ("start", "rest"),
    [(b"", head("GET", "/health", "X-A: " + "b" * 500)), (chat_head("Content-Length: 1000"), b" " * 1000)],
)
def test_what_trickles_is_cut(limited: Served, connect: Connect, start: bytes, rest: bytes) -> None:
    wire = connect()
    wire.send(start)
    trickle(wire, rest)
    wire.read(LATE)
    assert (wire.closed, wire.statuses) == (True, [408]), f"{wire.sent_bytes} bytes in {wire.seconds:.1f} s"


def test_a_slow_connection_is_kept_between_requests(limited: Served, connect: Connect) -> None:
    wire = connect()
    for _ in range(2):
        wire.got = b""
        wire.send(head())
        assert wire.read(until=b'"ok"}').startswith(b"HTTP/1.1 200")
        wire.read(1.5)
    assert not wire.closed, "the time of a head begins with its first byte"


@pytest.mark.parametrize(("key", "status", "most_mib"), [("wrong", 401, 16), (KEY, 413, 24)])
def test_an_endless_body_is_cut(
    limited: Served, connect: Connect, key: str, status: int, most_mib: int
) -> None:
    wire = connect()
    wire.send(chat_head("Transfer-Encoding: chunked", key=key))
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    while wire.sent_bytes < 256 * MIB and wire.send(chunk):
        pass
    wire.read()
    figures = f"{wire.sent_bytes / MIB:.1f} MiB were taken in {wire.seconds:.2f} s"
    assert wire.statuses == [status], figures
    assert wire.sent_bytes < most_mib * MIB, figures  # the limit, and what the system holds of a connection


def test_bodies_without_the_key_take_no_memory(limited: Served, connect: Connect) -> None:
    before_mib = resident_mib(limited)
    wires = [connect() for _ in range(40)]
    body = b"x" * (8 * MIB - 10)
    for wire in wires:
        wire.send(chat_head(f"Content-Length: {8 * MIB}", key="wrong"))
        wire.send(body)
    grown_mib = resident_mib(limited) - before_mib
    assert all(wire.statuses == [401] for wire in wires if wire.read())
    assert grown_mib < 64, f"40 bodies of 8 MiB took {grown_mib} MiB"


def test_bodies_together_take_what_they_may(limited: Served, connect: Connect) -> None:
    before_mib = resident_mib(limited)
    wires = [connect() for _ in range(40)]
    for wire in wires:
        wire.send(chat_head(f"Content-Length: {8 * MIB}"))
        wire.send(b"x" * (7 * MIB))
    grown_mib = resident_mib(limited) - before_mib
    check_health(connect)
    refused = [wire for wire in wires if wire.read(LATE) and wire.statuses == [503]]
    figures = f"40 bodies of 7 MiB took {grown_mib} MiB, {len(refused)} were refused"
    assert grown_mib < 160, figures
    assert len(refused) >= 30, figures
    assert all(b"body_memory_exceeded" in wire.got and b"retry-after" in wire.got for wire in refused)


def test_idle_connections_make_room(limited: Served, connect: Connect) -> None:
    log_bytes = limited.errors.stat().st_size
    before = refusals(limited, "idle_cut")
    wires = [connect() for _ in range(300)]
    check_health(connect)
    cut = sum(wire.read(0.01) == b"" and wire.closed for wire in wires)
    figures = f"{cut} of 300 cut, {open_files(limited.process.pid)} descriptors"
    assert cut >= 300 - 64, figures
    assert open_files(limited.process.pid) < 64 + 30, figures
    assert refusals(limited, "idle_cut") - before >= 300 - 64, figures
    grown = limited.errors.stat().st_size - log_bytes
    assert grown < 20_000, f"the log has grown by {grown} bytes"


def test_busy_connections_are_not_cut_for_others(limited: Served, connect: Connect) -> None:
    busy = [connect() for _ in range(64)]
    for wire in busy:
        wire.send(chat_head("Content-Length: 1000", "Expect: 100-continue"))
    for wire in busy:
        assert wire.read(until=b"100 Continue"), "its body is asked for"
    more = [connect() for _ in range(5)]
    for wire in more:
        wire.send(head())
        assert (wire.read() and wire.statuses) == [503]
        assert b"retry-after" in wire.got
        assert b"server_overloaded" in wire.got
    for wire in busy:
        assert b"HTTP/1.1 408" in wire.read(LATE), "they end as they would have"


@pytest.mark.parametrize("key", ["wrong", KEY])
def test_a_client_that_sends_too_much_sees_why(limited: Served, connect: Connect, key: str) -> None:
    for content in (b"x" * (20 * MIB), (b"x" * MIB for _ in range(20))):
        reply = limited.http.post(
            CHAT, content=content, headers={"x-api-key": key, "content-type": "application/json"}
        )
        assert reply.status_code == (413 if key == KEY else 401)


def test_a_client_that_leaves_in_its_body_leaves_no_traceback(limited: Served, connect: Connect) -> None:
    refused = '"path": "/v1/chat/completions", "status": 400'
    before = limited.errors.read_text().count(refused)
    wire = connect()
    wire.send(chat_head("Content-Length: 1000") + b"{")
    wire.close()
    until(lambda: limited.errors.read_text().count(refused) > before)
    assert "Traceback" not in limited.errors.read_text()
