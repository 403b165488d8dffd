"""The demo, a real server for the whole session."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.e2e.running import ROOT, Served, serving


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
