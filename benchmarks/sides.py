"""The sides of a comparison: how each is started, and how a load is put on it.

Every side is a process of its own, so that all have the same machine and none shares MLX with the load
generator. Knows the command lines and request bodies of each server; knows nothing of rounds or reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import httpx

from benchmarks.library import AdapterLibrary, AdapterSet, tensor_bytes
from benchmarks.load import Answer, LoadError, LoadResult, run_load
from benchmarks.processes import Child, ProcessError, child_process, free_port, wait_until_ready

__all__ = ["Question", "Side", "SideContext", "SideKind", "SideSpec", "open_side"]

_ROOT = Path(__file__).resolve().parents[1]
_SERVED_NAME = "base"


class SideKind(StrEnum):
    """What answers."""

    GRAFT = "mlx-graft"
    MLX_LM = "mlx_lm.server"
    BARE = "BatchGenerator"
    LOOP = "generation loop"
    DECODING = "decode steps"


_WORKERS: dict[SideKind, tuple[str, ...]] = {
    SideKind.BARE: ("benchmarks.workers.generators", "bare"),
    SideKind.LOOP: ("benchmarks.workers.generators", "loop"),
    SideKind.DECODING: ("benchmarks.workers.decoding",),
}
"""Those that speak through pipes: the module, and its arguments after the model's folder."""


@dataclass(frozen=True, slots=True)
class SideSpec:
    """What is started, with which adapters; `options` are flags of `mlx-graft serve`.

    `environment` holds variables, as pairs of name and value, beside those of this process.
    `memory_adapters` bounds the server's memory for adapters to what so many of the first set take; 0 is no
    bound. With `fresh_cache` it finds nothing that was compiled or measured before. `instance` tells sides
    apart for a reader.
    """

    kind: SideKind
    adapters: tuple[AdapterSet, ...] = ()
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    memory_adapters: int = 0
    fresh_cache: bool = False
    instance: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.instance}".strip()


@dataclass(frozen=True, slots=True)
class Question:
    """One request: `adapter` is the id of the adapter that answers it, None for the base.

    `arrives_seconds` runs from the load's start.
    """

    system: str
    prompt: str
    max_tokens: int
    adapter: str | None = None
    arrives_seconds: float = 0.0

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a chat."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.prompt}]


@dataclass(frozen=True, slots=True)
class SideContext:
    """What every side is started with; `capacities` is for what measures find out for each other."""

    model_path: Path
    library: AdapterLibrary
    log_folder: Path
    ready_seconds: float
    load_seconds: float
    capacities: dict[Hashable, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Side:
    """A running side. What only mlx-graft's server has raises ProcessError on the others."""

    spec: SideSpec
    context: SideContext
    child: Child
    root: Path
    client: httpx.AsyncClient

    async def ask(
        self,
        questions: Sequence[Question],
        *,
        in_flight: int | None = None,
        heard: Callable[[int], None] = lambda index: None,
    ) -> LoadResult:
        """Ask `in_flight` questions at a time, by default each when it arrives.

        `heard` is told of each piece of text, with its question's number.

        Raises: ProcessError if it does not answer all of them.
        """
        arrivals = [question.arrives_seconds for question in questions]
        if self.spec.kind in _WORKERS:
            return await self._ask_through_pipe(questions, arrivals)
        bodies = [
            {
                "messages": question.messages,
                "max_tokens": question.max_tokens,
                "temperature": 0,
                **self._model(question),
            }
            for question in questions
        ]
        url, seconds = f"{self.client.base_url}/v1/chat/completions", self.context.load_seconds
        try:
            return await run_load(url, bodies, seconds, in_flight=in_flight, arrivals=arrivals, heard=heard)
        except LoadError as error:
            raise self.child.failure(str(error)) from error

    async def load(self, adapter: str) -> dict[str, Any]:
        """Load an adapter; returns the adapter object."""
        return await self._call("POST", "/v1/adapters", {"id": adapter})

    async def unload(self, adapter: str) -> None:
        """Unload an adapter."""
        await self._call("DELETE", f"/v1/adapters/{adapter}")

    async def activate(self, adapter: str | None) -> dict[str, Any]:
        """Let the name `default` mean an adapter, or the base; returns the server's report."""
        return await self._call("PUT", "/v1/adapters/active", {"id": adapter})

    async def adapters(self) -> dict[str, Any]:
        """The server's list of adapters."""
        return await self._call("GET", "/v1/adapters")

    async def metric(self, name: str) -> float:
        """The value of a metric without labels.

        Raises: ProcessError if the server has no such metric.
        """
        text = await self._text("GET", "/metrics")
        found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        if found is None:
            raise self.child.failure(f"expected a metric {name} on /metrics, there is none")
        return float(found[1])

    async def process_bytes(self) -> int:
        """Physical memory of the side's process, as the system counts it."""
        pid = str(self.child.process.pid)
        process = await asyncio.create_subprocess_exec("ps", "-o", "rss=", "-p", pid, stdout=PIPE)
        output, _ = await process.communicate()
        if process.returncode or not output.strip().isdigit():
            raise self.child.failure(f"expected its resident kilobytes from ps, got {output!r}")
        return int(output) * 1024

    def _model(self, question: Question) -> dict[str, Any]:
        if self.spec.kind is SideKind.GRAFT:
            return {"model": question.adapter or _SERVED_NAME}
        # Only with the model's path does it heed `adapters`; with "default_model" it ignores it silently.
        adapters = {} if question.adapter is None else {"adapters": str(self.root / question.adapter)}
        return {"model": str(self.context.model_path), **adapters}

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return json.loads(await self._text(method, path, body))

    async def _text(self, method: str, path: str, body: dict[str, Any] | None = None) -> str:
        if self.spec.kind is not SideKind.GRAFT:
            raise ProcessError(f"{self.spec.kind} has no {path}")
        try:
            response = await self.client.request(method, path, json=body)
        except httpx.TransportError as error:
            raise self.child.failure(f"{method} {path} broke off: {error!r}") from error
        if response.is_error:
            raise self.child.failure(f"{method} {path} was answered {response.status_code}: {response.text}")
        return response.text

    async def _ask_through_pipe(self, questions: Sequence[Question], arrivals: list[float]) -> LoadResult:
        """Send the prompts down the pipe; the child keeps the time. Adapters are not for these sides."""
        if any(question.adapter is not None for question in questions):
            raise ValueError("expected questions to the base only, got some to adapters")
        values = await self.tell(
            {
                "chats": [question.messages for question in questions],
                "max_tokens": [question.max_tokens for question in questions],
                "arrivals": arrivals,
            }
        )
        answers = tuple(
            Answer(**{**answer, "text_seconds": tuple(answer["text_seconds"])})
            for answer in values["answers"]
        )
        return LoadResult(values["seconds"], answers)

    async def tell(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Send a line of JSON to a worker; returns its answer.

        Raises: ProcessError if there is none.
        """
        process = self.child.process
        if process.stdin is None or process.stdout is None:
            raise self.child.failure("expected pipes to it")
        try:
            async with asyncio.timeout(self.context.load_seconds):
                process.stdin.write(json.dumps(wanted).encode() + b"\n")
                await process.stdin.drain()
                reply = await process.stdout.readline()
        except (TimeoutError, ConnectionError) as error:
            raise self.child.failure(f"expected an answer, got {error!r}") from error
        if not reply:
            await process.wait()
            raise self.child.failure("expected an answer, its output ended")
        return json.loads(reply)


@contextlib.asynccontextmanager
async def open_side(spec: SideSpec, context: SideContext) -> AsyncIterator[Side]:
    """Start a side, wait until it is ready, and end it with the block.

    Raises: ProcessError if it does not become ready; AdapterError, OSError, ValueError if its adapters
    cannot be written.
    """
    root = await asyncio.to_thread(context.library.root, spec.adapters)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with (
        httpx.AsyncClient(base_url=url, trust_env=False, timeout=context.load_seconds) as client,
        child_process(
            str(spec),
            _command(spec, context, root, port),
            context.log_folder / f"{port}.log",
            cwd=_ROOT,
            environment=_environment() | _caches(spec, context, port) | dict(spec.environment),
            speaks=spec.kind in _WORKERS,
        ) as child,
    ):
        if spec.kind not in _WORKERS:
            ready_path = "/ready" if spec.kind is SideKind.GRAFT else "/health"
            await wait_until_ready(child, url + ready_path, context.ready_seconds)
        yield Side(spec, context, child, root, client)


def _command(spec: SideSpec, context: SideContext, root: Path, port: int) -> list[str]:
    python, model = sys.executable, str(context.model_path)
    if spec.kind in _WORKERS:
        module, *arguments = _WORKERS[spec.kind]
        return [python, "-m", module, model, *arguments]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    if spec.kind is SideKind.MLX_LM:
        return [python, "-m", "benchmarks.workers.mlx_lm_server", "--model", model, *address]
    names = ["--served-model-name", _SERVED_NAME, "--adapters-dir", str(root)]
    limit = ["--adapter-memory", str(_memory_bytes(spec, root))] if spec.memory_adapters else []
    return [python, "-m", "server", "serve", model, *names, *address, *limit, *spec.options]


def _memory_bytes(spec: SideSpec, root: Path) -> int:
    return spec.memory_adapters * tensor_bytes(root / spec.adapters[0].ids[0])


def _environment() -> dict[str, str]:
    """The environment without the server's own settings: a benchmark measures the defaults."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}


def _caches(spec: SideSpec, context: SideContext, port: int) -> dict[str, str]:
    if not spec.fresh_cache:
        return {}
    folder = context.log_folder / f"cache-{port}"
    folder.mkdir()
    return {"GRAFT_CACHE_DIR": str(folder), "MLX_PTX_CACHE_DIR": str(folder / "mlx")}
