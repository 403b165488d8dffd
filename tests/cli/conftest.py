"""A small real HTTP server with the contract's answers, and the program as people run it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from typer.testing import CliRunner

from server.cli.app import make_app

ADAPTER = {
    "id": "pirate",
    "object": "adapter",
    "created": 1764000000,
    "base": "tiny",
    "path": "pirate",
    "format": "mlx",
    "type": "lora",
    "rank": 8,
    "scale": 20.0,
    "modules": 60,
    "bytes": 1843200,
    "digest": "sha256:00",
    "version": 1,
    "state": "ready",
    "resident": True,
    "pinned": False,
    "active": True,
    "in_flight": 0,
    "requests": 12,
    "last_used": 1764000100,
    "load_seconds": 0.02,
}
SHOWN: dict[str, Any] = {
    "blend": {"method": "svd", "parts": [{"id": "pirate", "weight": 0.6}, {"id": "robot@2", "weight": -1.0}]},
    "versions": [{"version": 1, "state": "previous"}, {"version": 2, "state": "current"}],
    "checkpoints": [100, 200],
    "resident": False,
    "report": {
        "format": "mlx", "type": "lora", "digest": "sha256:00", "base_name": None, "modules": 60,
        "kinds": {"linear": 60}, "names": {"q_proj": 30, "v_proj": 30}, "layers": [0, 1, 2, 7],
        "ranks": [8], "scales": [20.0], "dtypes": ["float32"], "tensor_bytes": 1843200,
        "ignored_fields": ["iters"], "warnings": ["Another base."],
    },
}  # fmt: skip
"""What the server says of one adapter beyond what it says in lists."""
KEY = "s3cret"


@dataclass
class CannedServer:
    """What the server answers is fixed; what it was asked is kept."""

    url: str = ""
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    needs_key: bool = False


def canned_app(server: CannedServer) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def keep(request: Request, call_next: Callable[..., Any]) -> Response:
        body = await request.body()
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        server.requests.append((request.method, target, json.loads(body) if body else None))
        if server.needs_key and request.headers.get("authorization") != f"Bearer {KEY}":
            return error(401, "The API key is missing or wrong.", "invalid_api_key")
        return await call_next(request)

    @app.get("/v1/adapters")
    async def list_adapters() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [ADAPTER, {**ADAPTER, "id": "[bold]haiku", "active": False, "pinned": True}],
            "active": "pirate",
            "resident_bytes": 3686400,
            "memory_limit_bytes": 2**30,
            "available": ["sonnet"],
        }

    @app.get("/v1/adapters/{name}")
    async def one(name: str) -> dict[str, Any]:
        return {**ADAPTER, "id": name, **SHOWN}

    @app.post("/v1/adapters")
    async def load(request: Request) -> Response:
        body = await request.json()
        if body["id"] == "broken":
            details = ["tensor a is missing", "tensor b has shape (1, 2), expected (3, 4)"]
            return error(422, "The adapter 'broken' cannot be used.", "adapter_invalid", details)
        if body["id"] == "loaded":
            return error(409, "'loaded' is loaded. Send \"replace\": true.", "adapter_exists")
        if "blend" not in body:
            reports = {
                "foreign": {"warnings": ["Another base."]},
                "patterned": {"ranks": [2, 4, 6], "scales": [1.5, 11.3137]},
                "negative": {"ranks": [2], "scales": [-2.0, 0.5]},
            }
            report = {"report": reports[body["id"]]} if body["id"] in reports else {}
            return JSONResponse({**ADAPTER, "id": body["id"], **report}, 201)
        errors = {"error_mean": 0.125, "error_worst": 0.25} if "rank" in body else {}
        recipe = {"method": body.get("method", "linear"), **errors}
        return JSONResponse({**ADAPTER, "id": body["id"], "blend": recipe}, 201)

    @app.delete("/v1/adapters/{name}")
    async def unload(name: str) -> dict[str, Any]:
        return {**ADAPTER, "id": name, "freed_bytes": 0 if name == "twin" else 1843200}

    @app.put("/v1/adapters/active")
    async def swap(request: Request) -> dict[str, Any]:
        return {"active": (await request.json())["id"], "previous": "pirate", "swap_seconds": 0.00025}

    @app.post("/v1/adapters/{name}/rollback")
    async def roll_back(name: str) -> dict[str, Any]:
        return {**ADAPTER, "id": name}

    @app.post("/v1/adapters/{name}/save")
    async def save(name: str, request: Request) -> dict[str, Any]:
        body = await request.json()
        version, form = body.get("version", 3), body.get("format", "mlx")
        notes = ["Ranks differ (4, 8): zeros fill factors up to 8."] if form == "mlx" else []
        told = {"id": name, "version": version, "path": body["save_to"], "format": form, "notes": notes}
        return {**told, "modules": 60, "bytes": 1843200}

    @app.post("/v1/adapters/{name}/fuse")
    async def fuse(name: str) -> dict[str, Any]:
        activations = {"error_worst": 0.0, "worst_module": None, "agreement": 1.0}
        report = {"modules": 60, "precision": {"dense": 60}, "error_mean": 1.5e-07, "seconds": 0.5}
        return {"id": name, **report, "worst_module": None, "activations": activations}

    @app.delete("/v1/adapters/{name}/fuse")
    async def unfuse(name: str) -> dict[str, Any]:
        return {"id": name}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "tiny"}, {"id": "pirate"}]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        if body.get("model") == "missing":
            return error(
                404, "The model 'missing' does not exist; served are tiny, pirate.", "model_not_found"
            )
        return StreamingResponse(events(body), media_type="text/event-stream")

    @app.get("/html/v1/adapters")
    async def foreign() -> Response:
        return PlainTextResponse("<html>", 502)

    return app


def error(status: int, message: str, code: str, details: list[str] | None = None) -> JSONResponse:
    body: dict[str, Any] = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    if details is not None:
        body["details"] = details
    return JSONResponse({"error": body}, status)


def events(body: dict[str, Any]) -> Iterator[str]:
    """An answer that tells how often the user has spoken, in pieces; `model` chooses how it goes wrong."""
    spoken = sum(message["role"] == "user" for message in body["messages"])

    def event(value: dict[str, Any]) -> str:
        return f"data: {json.dumps(value)}\n\n"

    def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
        return event({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

    yield chunk({"role": "assistant", "content": ""})
    for piece in ("Arr, ", f"{spoken}\n", "é\x1b[31m"):
        yield chunk({"content": piece})
    if body.get("model") == "failing":
        yield event(
            {"error": {"message": "The model was unloaded.", "type": "x", "param": None, "code": None}}
        )
    elif body.get("model") != "cut":
        yield chunk({}, "stop")
        yield event({"choices": [], "usage": {}})
        yield "data: [DONE]\n\n"


@pytest.fixture
def canned() -> Iterator[CannedServer]:
    state = CannedServer()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        state.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        ready = threading.Event()

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets=sockets)
                ready.set()

        server = Server(uvicorn.Config(canned_app(state), log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert ready.wait(30)
            yield state
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@dataclass(frozen=True)
class Done:
    """How a run of the program ended."""

    code: int
    out: str
    err: str


Program = Callable[..., Done]


@pytest.fixture
def command() -> Program:
    """`mlx-graft` in this process, for the commands that are clients; else as `program`."""

    def run(*arguments: str, stdin: str = "", **variables: str) -> Done:
        env = {name: None for name in os.environ if name.upper().startswith("GRAFT_")} | variables
        app = make_app(with_settings=False)
        done = CliRunner().invoke(app, arguments, input=stdin, env=env, prog_name="mlx-graft")
        return Done(done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture
def program() -> Program:
    """`mlx-graft` as a process of its own, with no GRAFT_* variable but those given."""

    def run(*arguments: str, stdin: str = "", **variables: str) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "server", *arguments],
            input=stdin,
            env=environment(**variables),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in done.stderr + done.stdout
        return Done(done.returncode, done.stdout, done.stderr)

    return run


def environment(**variables: str) -> dict[str, str]:
    """This process' environment without GRAFT_* variables, and `variables`."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("GRAFT_")}
    return {**kept, "NO_COLOR": "1", "COLUMNS": "120", **variables}
