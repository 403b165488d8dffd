"""The parrot, loaded once, and the application over it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from server.engine.model import LoadedModel
from tests.api.parrot import load_parrot
from tests.api.serving import Service, serving


@pytest.fixture(scope="session")
def parrot() -> LoadedModel:
    return load_parrot()


@pytest_asyncio.fixture
async def service(parrot: LoadedModel) -> AsyncIterator[Service]:
    """The application with default settings."""
    async with serving(parrot) as started:
        yield started
