"""The tiny model, written once; an adapters root for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.adapters.support import House, Site, house, make_adapters, read_model, site, write_model


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def root(tmp_path: Path, model_path: Path) -> Path:
    return make_adapters(tmp_path / "adapters", read_model(model_path))


@pytest_asyncio.fixture
async def tiny_house(model_path: Path, root: Path) -> AsyncIterator[House]:
    async with house(model_path, root) as started:
        yield started


@pytest_asyncio.fixture
async def tiny_site(model_path: Path, root: Path, tmp_path: Path) -> AsyncIterator[Site]:
    models = tmp_path / "models"
    models.mkdir()
    async with site(model_path, root, models_dir=models, unload_timeout_seconds=5) as started:
        yield started
