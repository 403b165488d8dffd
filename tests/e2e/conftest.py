"""Two real servers for the whole session: the demo, and one whose adapters' folder tests may change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.e2e.running import DEMO_ADAPTERS, ROOT, Served, serving


@pytest.fixture(scope="session")
def questions() -> list[str]:
    """Questions that no adapter was trained on."""
    return json.loads((ROOT / "config" / "demo" / "questions.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def demo_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    errors = tmp_path_factory.mktemp("demo") / "errors.log"
    with serving(errors, "demo") as served:
        yield served


@pytest.fixture
def demo(demo_process: Served) -> Served:
    """The demo as it starts: every adapter loaded, none active or fused, whatever tests before did."""
    demo_process.restore()
    return demo_process


@pytest.fixture
def client(demo: Served) -> Iterator[OpenAI]:
    """The official client of the demo."""
    with demo.openai() as client:
        yield client


@pytest.fixture(scope="session")
def adapters_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the demo's adapters."""
    return shutil.copytree(DEMO_ADAPTERS, tmp_path_factory.mktemp("served") / "adapters")


@pytest.fixture(scope="session")
def own_process(
    demo_model_path: Path, adapters_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """The demo's model over `adapters_root`, with nothing loaded."""
    errors = tmp_path_factory.mktemp("own") / "errors.log"
    with serving(errors, "serve", str(demo_model_path), "--adapters-dir", str(adapters_root)) as served:
        yield served
