"""A real server with short limits, of a model that computes next to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.running import Served, serving
from tests.e2e.streams import write_long_model

from .sockets import KEY, Wire

Connect = Callable[[], Wire]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_long_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def limited(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Heads have 1 s, bodies 2 s and 8 MiB, 16 MiB together; 64 connections; a key."""
    errors = tmp_path_factory.mktemp("limited") / "errors.log"
    flags = {
        "--head-timeout-seconds": "1",
        "--body-timeout-seconds": "2",
        "--body-memory-bytes": "16MiB",
        "--max-connections": "64",
        "--api-key": KEY,
    }
    with serving(
        errors, "serve", str(model_path), *(part for item in flags.items() for part in item)
    ) as server:
        server.http.headers["x-api-key"] = KEY
        yield server


@pytest.fixture
def connect(limited: Served) -> Iterator[Connect]:
    """Opens connections to the server, and closes them at the end."""
    wires: list[Wire] = []

    def open_one() -> Wire:
        wires.append(Wire(limited))
        return wires[-1]

    yield open_one
    for wire in wires:
        wire.close()
