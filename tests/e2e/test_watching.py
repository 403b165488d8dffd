"""Adapters are written into a folder that a running server watches, while it streams."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adapters.support import BASE, read_model
from tests.e2e.running import Served, error_of, serving, until
from tests.e2e.streams import WORDS, Stream, reference, write_long_model
from tests.models import make_adapter

SETTLE_SECONDS = 0.3


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_long_model(tmp_path_factory.mktemp("models") / BASE)


@pytest.fixture(scope="module")
def written(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters v1 to v4, as a training would leave them, outside of what is watched."""
    folder = tmp_path_factory.mktemp("written")
    for seed in range(1, 5):
        make_adapter(folder / f"v{seed}", read_model(model_path), seed=10 + seed)
    return folder


@pytest.fixture
def watched(tmp_path: Path, written: Path) -> Path:
    root = tmp_path / "adapters"
    shutil.copytree(written / "v1", root / "x")
    return root


@pytest.fixture
def server(model_path: Path, watched: Path, tmp_path: Path) -> Iterator[Served]:
    settings = ["--adapters-dir", str(watched), "--watch", "--watch-settle-seconds", str(SETTLE_SECONDS)]
    with serving(tmp_path / "errors.log", "serve", str(model_path), *settings) as served:
        until(lambda: "x" in served.adapters())
        yield served


def write_in_pieces(source: Path, target: Path) -> None:
    """Write an adapter over another as a trainer does: in place, the weights bit by bit."""
    target.mkdir(exist_ok=True)
    shutil.copy(source / "adapter_config.json", target / "adapter_config.json")
    content = (source / "adapters.safetensors").read_bytes()
    size = len(content) // 4 + 1
    with (target / "adapters.safetensors").open("wb", buffering=0) as file:
        for start in range(0, len(content), size):
            file.write(content[start : start + size])


def test_a_stream_ends_on_the_version_that_it_began_with_whatever_is_written_meanwhile(
    server: Served, watched: Path, written: Path, model_path: Path
) -> None:
    def shown() -> dict[str, Any]:
        return server.adapters()["x"]

    def says(model: str) -> str:
        reply = server.ask("POST", "/v1/chat/completions", json={**WORDS, "model": model, "max_tokens": 16})
        return reply["choices"][0]["message"]["content"]

    first = says("x")
    stream = Stream(server, "x")
    answers = []
    for version in (2, 3):
        write_in_pieces(written / f"v{version}", watched / "x")
        until(lambda version=version: shown()["version"] == version)
        answers.append(says("x"))
    assert len({first, *answers}) == 3
    assert [says("x@2"), says("x@3")] == answers

    content = (written / "v4" / "adapters.safetensors").read_bytes()
    (watched / "x" / "adapters.safetensors").write_bytes(content[: len(content) // 2])  # no more will come
    until(lambda: "adapter_folder_broken" in server.errors.read_text())
    now = shown()
    states = {each["version"]: each["state"] for each in now["versions"]}
    assert (states, now["in_flight"]) == ({1: "finishing", 2: "previous", 3: "current"}, 1)
    assert says("x") == answers[1]
    refused = server.ask("POST", "/v1/chat/completions", 404, json={**WORDS, "model": "x@1"})
    assert "'x@3', 'x@2'" in error_of(refused)["message"]

    stream.more()
    tokens = stream.leave()
    assert tokens == reference(model_path, written / "v1", len(tokens))
    until(lambda: shown()["in_flight"] == 0)
    assert [each["version"] for each in shown()["versions"]] == [2, 3]

    assert server.ask("POST", "/v1/adapters/x/rollback")["version"] == 2
    assert says("x") == answers[0]
    shutil.copy(written / "v4" / "adapters.safetensors", watched / "x" / "0000100_adapters.safetensors")
    shutil.copytree(written / "v4", watched / "x", dirs_exist_ok=True)
    until(lambda: shown()["version"] == 4)
    assert says("x@step-100") == says("x")
    assert server.ask("GET", "/v1/adapters/x")["checkpoints"] == [100]
    assert server.errors.read_text().count("adapter_folder_broken") == 1
