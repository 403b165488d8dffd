"""What the system refuses a real server is told by /ready, until it gives again."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from tests.adapters.support import make_adapters, read_model, write_model

from .running import Served, error_of, serving

if sys.platform == "linux":
    import resource
else:
    pytest.skip("limits of another process can be changed on Linux alone", allow_module_level=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a tiny model."""
    folder = tmp_path_factory.mktemp("resources")
    model = write_model(folder / "tiny")
    root = make_adapters(folder / "adapters", read_model(model))
    with serving(folder / "errors.log", "serve", str(model), "--adapters-dir", str(root)) as started:
        yield started


def chat(served: Served, name: str, status: int = 200) -> dict[str, object]:
    body = {"model": name, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    return served.ask("POST", "/v1/chat/completions", status, json=body)


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def test_ready_tells_of_files_that_cannot_be_opened(served: Served) -> None:
    pid = served.process.pid
    served.ask("GET", "/ready")  # leaves its connection open
    chat(served, "a")
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)

    resource.prlimit(pid, resource.RLIMIT_NOFILE, (open_files(pid), before[1]))
    refused = error_of(served.ask("GET", "/ready", 503))
    chat(served, "a")
    load = error_of(chat(served, "b", 503))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)

    assert refused["code"] == "out_of_resources"
    assert "more open files" in refused["message"]
    assert load["code"] == "out_of_resources"
    served.ask("GET", "/ready")
    chat(served, "b")
