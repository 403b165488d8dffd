"""Engines that are started and stopped around a test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from server.engine.engine import Engine
from tests.engine.engines import Gate, Gated, make_engine
from tests.engine.support import loaded
from tests.models import tiny_llama


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = make_engine(lambda: loaded(tiny_llama()), max_batch_size=4)
    await engine.start()
    yield engine
    await engine.stop(0.0)


@pytest.fixture
async def gated() -> AsyncIterator[tuple[Engine, Gate]]:
    """An engine of one row that waits for nobody else, and its gate, closed."""
    gate = Gate()
    engine = make_engine(
        lambda: loaded(Gated(tiny_llama(), gate)), max_batch_size=1, prefill_batch_size=1, max_waiting=2
    )
    await engine.start()
    yield engine, gate
    gate.open()
    await engine.stop(0.0)
