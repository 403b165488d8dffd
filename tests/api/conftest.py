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


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(parrot: LoadedModel) -> AsyncIterator[Service]:
    """One application with default settings for a whole module: what a request spoils shows in the next."""
    async with serving(parrot) as started:
        yield started
