"""One server with the demo's model, whose adapters lie in a folder and are loaded by nothing but requests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.running import BASE, DEMO_ADAPTERS, PYTHON, ROOT, Served, environment, serving

QUESTION = "What is the capital of Italy?"
CONTEXT_TOKENS = 8192
LONG = "word " * (CONTEXT_TOKENS + 800)
"""More tokens than the model's context has."""


@pytest.fixture(scope="session")
def adapters_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's adapters, and one under the name of an owner, as a download from a hub would be."""
    root = tmp_path_factory.mktemp("adapters")
    for config in DEMO_ADAPTERS.glob("*/adapter_config.json"):
        shutil.copytree(config.parent, root / config.parent.name)
    shutil.copytree(root / "robot", root / "someone" / "robot-lora")
    return root


@pytest.fixture(scope="session")
def server(adapters_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    errors = tmp_path_factory.mktemp("server") / "errors.log"
    arguments = ["--adapters-dir", str(adapters_root), "--served-model-name", BASE]
    with serving(errors, "serve", _demo_model(), *arguments) as served:
        yield served


@pytest.fixture
def url(server: Served) -> str:
    """Where OpenAI's clients are pointed to."""
    return f"{server.url}/v1"


@pytest.fixture(scope="session")
def pirate_answer(server: Served) -> str:
    """What the adapter `pirate` answers to the question, greedily, in 16 tokens."""
    asked = {"model": "pirate", "temperature": 0, "max_tokens": 16}
    messages = [{"role": "user", "content": QUESTION}]
    answer = server.ask("POST", "/v1/chat/completions", json={**asked, "messages": messages})
    return answer["choices"][0]["message"]["content"]


def _demo_model() -> str:
    """The folder of the demo's model, which is converted first if no run before has done so."""
    program = (
        "from server.cache_dir import default_cache_dir; from server.demo.model import demo_model;"
        "print(demo_model('float32', default_cache_dir(), progress=lambda message: None))"
    )
    done = subprocess.run(
        [PYTHON, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
