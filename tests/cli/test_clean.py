"""`mlx-graft clean`, and what a start removes, after writers were killed in the middle of their work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from adapters_core.container import AdapterContainer
from adapters_core.files import PART_MARK
from tests.adapters.support import read_model, write_model
from tests.e2e.running import serving
from tests.models import make_adapter

from .conftest import Program


def parts(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if PART_MARK in name]


def kill_while_writing(folder: Path, process: subprocess.Popen[str], begin: Callable[[], None]) -> None:
    """SIGKILL as soon as something half-written lies in `folder`."""
    thread = threading.Thread(target=begin, daemon=True)
    thread.start()
    ends = time.monotonic() + 60
    while not parts(folder):
        assert time.monotonic() < ends, "expected something to be written within 60 s"
    process.send_signal(signal.SIGKILL)
    process.wait()
    thread.join(60)
    assert parts(folder)


def test_what_a_killed_writer_left_is_removed_by_the_command(command: Program, tmp_path: Path) -> None:
    part = tmp_path / f".b.{'0' * 32}{PART_MARK}"
    part.mkdir()
    (part / "half").write_text("content")
    (tmp_path / ".own.folder").mkdir()
    done = command("clean", str(tmp_path), "--cache-dir", str(tmp_path / "cache"), "--json")
    assert json.loads(done.out) == {"removed": [str(part)]}
    assert os.listdir(tmp_path) == [".own.folder"]
    assert command("clean", str(tmp_path / "b")).code == 2


def test_a_start_removes_what_a_killed_server_left(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    root, models, cache = tmp_path / "root", tmp_path / "models", tmp_path / "cache"
    make_adapter(root / "a", read_model(model), rank=1000)
    models.mkdir()
    flags = ("--adapters-dir", str(root), "--models-dir", str(models), "--cache-dir", str(cache))
    calls = [("/v1/adapters/a/save", root), ("/v1/adapters/a/fuse", models)]
    for path, written in calls:
        with serving(tmp_path / "errors", "serve", str(model), *flags) as served:
            assert [parts(folder) for folder in (root, models)] == [[], []]
            assert len(os.listdir(cache / "versions")) <= 1 if (cache / "versions").exists() else True
            served.ask("POST", "/v1/adapters", 201, json={"id": "a"})

            def save(url: str = served.url + path) -> None:
                try:
                    httpx.post(url, json={"save_to": "b"}, timeout=60, trust_env=False)
                except httpx.HTTPError:
                    return

            kill_while_writing(written, served.process, save)
        assert not (written / "b").exists()
    assert os.listdir(cache / "versions")
    with serving(tmp_path / "errors", "serve", str(model), *flags) as served:
        assert [parts(folder) for folder in (root, models)] == [[], []]
        assert os.listdir(cache / "versions") == []
        served.ask("POST", "/v1/adapters/a/save", 404, json={"save_to": "b"})
        served.ask("POST", "/v1/adapters", 201, json={"id": "a"})
        assert served.ask("POST", "/v1/adapters/a/save", json={"save_to": "b"})["path"] == "b"
    assert AdapterContainer.from_directory(root / "b").format == "mlx"
