"""The tiny model, written once; an adapters root for each test."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from adapters_core.bank import AdapterBank
from adapters_core.container import AdapterContainer
from adapters_core.mixed.routing import Routing
from tests.adapters.support import (
    NAMES,
    House,
    Site,
    answer_of,
    house,
    make_adapters,
    read_model,
    site,
    write_model,
)
from tests.models import make_adapter


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


@pytest.fixture(scope="session")
def equal_root(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Path:
    """A root with four LoRAs of one size."""
    root, model = tmp_path_factory.mktemp("equal"), read_model(model_path)
    for seed, name in enumerate(NAMES):
        make_adapter(root / name, model, seed=20 + seed)
    return root


@pytest.fixture
def own_root(tmp_path: Path, equal_root: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(equal_root, tmp_path / "own"))


@pytest.fixture(scope="session")
def size_bytes(model_path: Path, equal_root: Path) -> int:
    """What one of them takes."""
    bank = AdapterBank(read_model(model_path), Routing())
    return bank.prepare(AdapterContainer.from_directory(equal_root / "a")).resident.size_bytes


@pytest.fixture(scope="session")
def expected(model_path: Path, equal_root: Path) -> dict[str, list[int]]:
    """What mlx-lm answers with each."""
    return {name: answer_of(model_path, equal_root / name) for name in NAMES}
