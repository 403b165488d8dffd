"""Clients by hand, byte by byte, and what a process says of itself in /proc."""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.running import Served

KEY = "sesame"
CHAT = "/v1/chat/completions"
MIB = 2**20


def head(method: str = "GET", path: str = "/health", *headers: str) -> bytes:
    """A request's line and headers."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def chat_head(*headers: str, key: str = KEY) -> bytes:
    """The head of a request with a JSON body."""
    return head("POST", CHAT, f"Authorization: Bearer {key}", "Content-Type: application/json", *headers)


@dataclass
class Wire:
    """One connection. `got` is all that has come on it, `closed` whether its other end is gone."""

    server: Served
    got: bytes = b""
    sent_bytes: int = 0
    closed: bool = False
    opened_seconds: float = field(default_factory=time.monotonic)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._socket = socket.create_connection(("127.0.0.1", int(self.server.port)), timeout=30)

    def send(self, data: bytes) -> bool:
        """Whether all of it could be sent."""
        try:
            self._socket.sendall(data)
        except OSError:
            return False
        self.sent_bytes += len(data)
        return True

    def read(self, timeout_seconds: float = 30, until: bytes | None = None) -> bytes:
        """All that comes until the other end closes, until `until` has come, or for so long."""
        ends = time.monotonic() + timeout_seconds
        while not self.closed and (until is None or until not in self.got):
            self._socket.settimeout(max(0.001, ends - time.monotonic()))
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                break
            except OSError:
                data = b""
            self.got += data
            self.closed = not data
        self.seconds = time.monotonic() - self.opened_seconds
        return self.got

    @property
    def statuses(self) -> list[int]:
        """Those of the answers that have come."""
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", self.got)]

    def close(self) -> None:
        self._socket.close()


def resident_mib(server: Served) -> int:
    """The memory that the process takes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) // 1024


def open_files(process_id: int) -> int:
    """How many files and connections a process has open."""
    return len(os.listdir(f"/proc/{process_id}/fd"))


def file_limits(process_id: int) -> tuple[int, int]:
    """The soft and the hard limit of open files that are in force for a process."""
    limits = Path(f"/proc/{process_id}/limits").read_text()
    soft, hard = re.findall(r"Max open files\s+(\d+)\s+(\d+)", limits)[0]
    return int(soft), int(hard)
