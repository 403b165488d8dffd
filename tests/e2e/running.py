"""`mlx-graft` as a process, a server or a client, and what tests ask a server past the official client."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

ROOT = Path(__file__).parents[2]
"""The checkout."""
BASE = "SmolLM2-135M-Instruct"
"""The name under which the demo's model is served."""
DEMO_ADAPTERS = ROOT / "config" / "demo" / "adapters"
PYTHON = os.environ.get("SERVER_PYTHON", sys.executable)
"""The interpreter that runs the server: of another environment where the tests have one without MLX."""
START_SECONDS = 180
STOP_SECONDS = 60


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Served:
    """A running server. `http` speaks to it; `errors` is the file of its standard error."""

    url: str
    process: subprocess.Popen[str]
    errors: Path
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=120, trust_env=False)

    @property
    def port(self) -> str:
        return self.url.rpartition(":")[2]

    def openai(self) -> OpenAI:
        """The official client. What it would try again is an error here."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def ask(self, method: str, path: str, status: int = 200, **arguments: Any) -> Any:
        """The JSON of an answer that must have `status`."""
        reply = self.http.request(method, path, **arguments)
        assert reply.status_code == status, f"{method} {path}: {reply.status_code} {reply.text}"
        return reply.json()

    def adapters(self) -> dict[str, dict[str, Any]]:
        """The adapters that are loaded, by id."""
        return {adapter["id"]: adapter for adapter in self.ask("GET", "/v1/adapters")["data"]}

    def restore(self) -> None:
        """Everything that could be loaded is; nothing is active or fused."""
        for name, adapter in self.adapters().items():
            if adapter["state"] == "fused":
                self.ask("DELETE", f"/v1/adapters/{name}/fuse")
        self.ask("PUT", "/v1/adapters/active", json={"id": None})
        for name in self.ask("GET", "/v1/adapters")["available"]:
            self.ask("POST", "/v1/adapters", 201, json={"id": name})


def environment(**variables: str) -> dict[str, str]:
    """This process' environment, of the GRAFT_* variables only the cache's folder, and `variables`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "GRAFT_CACHE_DIR" or not name.upper().startswith("GRAFT_")
    }
    # With more, OpenBLAS's threads wait for each other, busily, whenever something else runs as well.
    return {"OPENBLAS_NUM_THREADS": "1", **kept, "NO_COLOR": "1", "COLUMNS": "120", **variables}


def command(*arguments: str) -> list[str]:
    """`mlx-graft` with these arguments, from this checkout."""
    return [PYTHON, "-m", "server", *arguments]


def run(*arguments: str, url: str | None = None, stdin: str = "", timeout_seconds: float = 120) -> Done:
    """A command of `mlx-graft` to its end, as a client of `url` if there is one."""
    done = subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(**({} if url is None else {"GRAFT_URL": url})),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@contextmanager
def serving(errors: Path, *arguments: str, limits: str = "") -> Iterator[Served]:
    """`mlx-graft` with `arguments` for as long as the block, ready when it begins, surely gone after it.

    `limits` are options of the shell's `ulimit`.
    """
    words = command(*arguments, "--port", "0")
    limited = ["bash", "-c", f'ulimit {limits} && exec "$@"', "bash"] if limits else []
    with errors.open("w") as log:
        process = subprocess.Popen(
            [*limited, *words],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        served = Served(_url(process, errors), process, errors)
        with served.http:
            yield served
    finally:
        _end(process)


def _url(process: subprocess.Popen[str], errors: Path) -> str:
    """Where it serves: its first words once it is ready. A start that takes too long is ended."""
    assert process.stdout is not None
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            if found := re.search(r"Serving .* on (http://\S+)", line):
                return found[1].rstrip(".")
    finally:
        watchdog.cancel()
    raise AssertionError(
        f"the server did not become ready (exit code {process.wait()}):\n{errors.read_text()}"
    )


def _end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()


def until(what: Callable[[], bool]) -> None:
    """Ask again and again until it is so; HTTP has no way to be told."""
    ends = time.monotonic() + 60
    while not what():
        assert time.monotonic() < ends, "expected it to become so within 60 s"
        time.sleep(0.02)


def error_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """The error in a body, which must have the contract's shape."""
    error = body["error"]
    assert {"message", "type", "param", "code"} <= set(error), error
    assert isinstance(error["message"], str)
    assert error["message"]
    return error
