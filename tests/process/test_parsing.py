"""What is no HTTP beyond doubt is refused and its connection closed: nothing in it is another request."""

from __future__ import annotations

import json

import pytest

from tests.e2e.running import Served, error_of

from .conftest import Connect
from .sockets import KEY, head

POST = b"POST /version HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET /version HTTP/1.1\r\nHost: localhost\r\n"

REFUSED = {
    "length and chunks": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nx",
    "the same length twice": POST + b"Content-Length: 1\r\ncontent-length: 1\r\n\r\nx",
    "a list of lengths": POST + b"Content-Length: 1, 1\r\n\r\nx",
    "a length with a sign": POST + b"Content-Length: +1\r\n\r\nx",
    "a length of another base": POST + b"Content-Length: 0x1\r\n\r\nx",
    "an empty length": POST + b"Content-Length:\r\n\r\nx",
    "a space before the colon": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "another encoding": POST + b"Transfer-Encoding: xchunked\r\n\r\n",
    "two encodings": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": POST.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a folded header": GET + b"X-A: a\r\n b\r\n\r\n",
    "a folded encoding": POST + b"Transfer-Encoding:\r\n\tchunked\r\n\r\n0\r\n\r\n",
    "lines without carriage returns": GET.replace(b"\r", b"") + b"\n",
    "one line without a carriage return": GET + b"X-A: b\nX-C: d\r\n\r\n",
    "a carriage return in a header": GET + b"X-A: a\rb\r\n\r\n",
    "a NUL": GET + b"X-A: a\x00b\r\n\r\n",
    "two hosts": GET + b"Host: evil.example\r\n\r\n",
    "another version": GET.replace(b"1.1", b"2.0") + b"\r\n",
    "a head too long": GET + b"X-A: " + b"b" * 40_000 + b"\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "a chunk longer than it says": POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nxx\r\n0\r\n\r\n",
    "a chunk's length with a sign": POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\nx\r\n0\r\n\r\n",
    "chunks without carriage returns": POST + b"Transfer-Encoding: chunked\r\n\r\n1\nx\n0\n\n",
}

SMUGGLED = head("GET", "/version", f"X-Api-Key: {KEY}")


@pytest.mark.parametrize("request_bytes", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_http_is_refused(limited: Served, connect: Connect, request_bytes: bytes) -> None:
    wire = connect()
    wire.send(request_bytes + SMUGGLED)
    reply = wire.read()
    assert wire.closed
    assert len(wire.statuses) == 1, f"what followed was taken for a request of its own: {reply!r}"
    assert wire.statuses[0] in (400, 431, 501, 505), reply
    assert error_of(json.loads(reply.rpartition(b"\r\n\r\n")[2]))["code"] == "invalid_http"
    assert b"x-request-id: req_" in reply


def test_chunks_that_go_wrong_in_a_body_are_refused(limited: Served, connect: Connect) -> None:
    chunked = ("POST", "/v1/chat/completions", "Transfer-Encoding: chunked", f"X-Api-Key: {KEY}")
    wire = connect()
    wire.send(head(*chunked, "Content-Type: application/json", "Expect: 100-continue"))
    wire.read(until=b"100 Continue\r\n\r\n")
    wire.send(b"1\r\n{XX\r\n" + SMUGGLED)
    wire.read()
    assert (wire.closed, wire.statuses) == (True, [100, 400])
    assert "Traceback" not in limited.errors.read_text()


def test_a_body_of_single_bytes_is_refused(limited: Served, connect: Connect) -> None:
    chunked = ("POST", "/v1/chat/completions", "Transfer-Encoding: chunked", f"X-Api-Key: {KEY}")
    wire = connect()
    wire.send(head(*chunked, "Content-Type: application/json") + b"1\r\n \r\n" * 2000)
    assert b"too many small chunks" in wire.read()
    assert (wire.closed, wire.statuses) == (True, [400])
    for size, count in [(1, 1000), (64, 2000)]:
        wire = connect()
        chunk = b"%x\r\n%s\r\n" % (size, b" " * size)
        wire.send(head(*chunked, "Content-Type: application/json") + chunk * count + b"0\r\n\r\n")
        assert b"not valid JSON" in wire.read(until=b"}}"), "all of it was taken"


def test_requests_of_one_connection_are_answered_in_turn(limited: Served, connect: Connect) -> None:
    wire = connect()
    wire.send(SMUGGLED + head() + head("GET", "/version", f"X-Api-Key: {KEY}", "Connection: close"))
    wire.read()
    assert (wire.closed, wire.statuses) == (True, [200, 200, 200])


def test_an_upgrade_is_passed_over(limited: Served, connect: Connect) -> None:
    wire = connect()
    wire.send(head("GET", "/health", "Connection: Upgrade", "Upgrade: websocket"))
    assert wire.read(until=b"}").startswith(b"HTTP/1.1 200")
