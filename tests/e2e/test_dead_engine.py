"""A generation thread that hangs or ends: a real process says so, answers in its shape, and ends in time."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.cli.running import ENGINE_DIED
from tests.adapters.support import make_adapters, read_model, write_model

from .running import ROOT, environment, error_of, until

STOP_SECONDS = 30  # a bound on hangs; it takes some 3 s


@dataclass
class Patient:
    """A server that hangs or dies when told to; `wishes` is the folder of files that tell it."""

    process: subprocess.Popen[bytes]
    http: httpx.Client
    wishes: Path
    log: Path

    def chat(
        self, model: str, tokens: int = 2, told: Callable[[str, Any], None] | None = None
    ) -> httpx.Response:
        """Ask; `told` hears of each step on the way."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": tokens,
        }
        extensions = {"trace": told} if told else None
        return self.http.post("/v1/chat/completions", json=body, extensions=extensions)

    def refused(self, method: str, path: str, **arguments: Any) -> str:
        """The code of a 503."""
        reply = self.http.request(method, path, **arguments)
        assert reply.status_code == 503, reply.text
        return error_of(reply.json())["code"]

    def hang(self) -> None:
        """Let the next forward hang, and wait until it does."""
        (self.wishes / "hang").touch()
        until((self.wishes / "hangs").exists)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_SECONDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and its adapters."""
    folder = tmp_path_factory.mktemp("patient")
    model = write_model(folder / "tiny")
    return model, make_adapters(folder / "adapters", read_model(model))


@pytest.fixture
def patient(folders: tuple[Path, Path], tmp_path: Path) -> Iterator[Patient]:
    (wishes := tmp_path / "wishes").mkdir()
    port = tmp_path / "port"
    log = tmp_path / "log"
    arguments = [*map(str, folders), str(wishes), str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.hanging_server", *arguments],
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=output,
        )
    try:
        until(lambda: (port.exists() and bool(port.read_text())) or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        url = f"http://127.0.0.1:{port.read_text()}"
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
            yield Patient(process, http, wishes, log)
    finally:
        process.kill()
        process.wait()


class Asked:
    """A request on a thread of its own, which has been sent."""

    def __init__(self, patient: Patient, model: str) -> None:
        self.replies: list[httpx.Response] = []
        sent = threading.Event()

        def told(step: str, _: Any) -> None:
            if step == "http11.send_request_body.complete":
                sent.set()

        self._thread = threading.Thread(target=lambda: self.replies.append(patient.chat(model, told=told)))
        self._thread.start()
        assert sent.wait(STOP_SECONDS)

    def reply(self) -> httpx.Response:
        self._thread.join(STOP_SECONDS)
        return self.replies[0]


def test_hanging_step_is_told_and_passes(patient: Patient) -> None:
    assert patient.chat("tiny").status_code == 200
    (patient.wishes / "hang").touch()
    asked = Asked(patient, "tiny")
    until((patient.wishes / "hangs").exists)
    until(lambda: patient.http.get("/ready").status_code == 503)

    assert patient.refused("GET", "/ready") == "engine_stuck"
    assert patient.refused("GET", "/health") == "engine_stuck"
    assert patient.refused("POST", "/v1/adapters", json={"id": "a"}) == "engine_stuck"
    listed = patient.http.get("/v1/adapters")
    assert listed.status_code == 200
    assert listed.json()["available"] == ["a", "b", "broken", "d"]
    assert patient.http.get("/v1/models").status_code == 200
    started = time.monotonic()
    assert patient.chat("a").json()["error"]["code"] == "engine_stuck"
    assert time.monotonic() - started < 10

    (patient.wishes / "hang").unlink()
    assert asked.reply().status_code == 200
    until(lambda: patient.http.get("/ready").status_code == 200)
    assert patient.chat("a").status_code == 200


def test_hanging_step_does_not_hold_a_stop_up(patient: Patient) -> None:
    (patient.wishes / "hang").touch()
    asked = Asked(patient, "tiny")
    until((patient.wishes / "hangs").exists)
    loading = Asked(patient, "a")

    assert patient.end() == 0
    for reply in (asked.reply(), loading.reply()):
        assert reply.status_code == 503, reply.text
        assert error_of(reply.json())["code"] in ("server_stopping", "engine_stopped", "engine_stuck")


def test_hanging_load_does_not_hold_a_stop_up(patient: Patient) -> None:
    (patient.wishes / "hang").touch()
    with pytest.raises(httpx.ReadTimeout):
        patient.http.post("/v1/completions", json={"model": "tiny", "prompt": "x"}, timeout=0.5)
    with pytest.raises(httpx.ReadTimeout):
        patient.http.post("/v1/adapters", json={"id": "a"}, timeout=0.5)

    assert patient.end() == 0


def test_dead_thread_ends_the_process(patient: Patient) -> None:
    assert patient.chat("tiny").status_code == 200
    (patient.wishes / "die").touch()

    reply = patient.chat("tiny")

    assert reply.status_code == 503, reply.text
    assert error_of(reply.json())["code"] in ("server_stopping", "engine_stopped")
    assert patient.process.wait(STOP_SECONDS) == ENGINE_DIED == 70
    assert "the generation thread has ended" in patient.log.read_text()
