"""The sides of a comparison: how each is started, and how a load is put on it.

Every side is a process of its own, so that all have the same machine and none shares MLX with the load
generator. Knows the command lines and request bodies of each server; knows nothing of rounds or reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.cases import Question, SideName
from benchmarks.load import LoadError, run_load
from benchmarks.processes import Child, child_process, free_port, wait_until_ready
from benchmarks.results import Answer, LoadResult

__all__ = ["Side", "SideContext", "open_side"]

_ROOT = Path(__file__).resolve().parents[1]
_SERVED_NAME = "base"


class Side(Protocol):
    """Something that answers loads."""

    async def run(self, questions: Sequence[Question]) -> LoadResult:
        """Ask all questions at once. Raises: ProcessError if it cannot answer all of them."""
        ...


@dataclass(frozen=True, slots=True)
class SideContext:
    """What the sides are started with. `adapters` are folders, all directly under one root."""

    model_path: Path
    adapters: tuple[Path, ...]
    log_folder: Path
    ready_seconds: float
    load_seconds: float

    def adapter(self, question: Question) -> Path | None:
        """The folder of the adapter that answers `question`."""
        return None if question.adapter is None else self.adapters[question.adapter]


@dataclass(frozen=True, slots=True)
class _HttpSide:
    child: Child
    url: str
    body: Callable[[Question], dict[str, Any]]
    timeout_seconds: float

    async def run(self, questions: Sequence[Question]) -> LoadResult:
        """Stream all answers over HTTP."""
        bodies = [
            {
                "messages": [{"role": "user", "content": question.prompt}],
                "max_tokens": question.max_tokens,
                "temperature": 0,
                **self.body(question),
            }
            for question in questions
        ]
        try:
            return await run_load(f"{self.url}/v1/chat/completions", bodies, self.timeout_seconds)
        except LoadError as error:
            raise self.child.failure(str(error)) from error


@dataclass(frozen=True, slots=True)
class _BareSide:
    child: Child
    timeout_seconds: float

    async def run(self, questions: Sequence[Question]) -> LoadResult:
        """Send the prompts down the pipe; the child keeps the time. Adapters are not for this side."""
        if any(question.adapter is not None for question in questions):
            raise ValueError("expected questions to the base only, got some to adapters")
        process = self.child.process
        if process.stdin is None or process.stdout is None:
            raise self.child.failure("expected pipes to it")
        prompts = [question.prompt for question in questions]
        line = json.dumps({"prompts": prompts, "max_tokens": questions[0].max_tokens})
        try:
            async with asyncio.timeout(self.timeout_seconds):
                process.stdin.write(line.encode() + b"\n")
                await process.stdin.drain()
                reply = await process.stdout.readline()
        except (TimeoutError, ConnectionError) as error:
            raise self.child.failure(f"expected an answer, got {error!r}") from error
        if not reply:
            await process.wait()
            raise self.child.failure("expected an answer, its output ended")
        values = json.loads(reply)
        return LoadResult(values["seconds"], tuple(Answer(**answer) for answer in values["answers"]))


@contextlib.asynccontextmanager
async def open_side(name: SideName, context: SideContext) -> AsyncIterator[Side]:
    """Start a side, wait until it is ready, and end it with the block.

    Raises: ProcessError if it does not become ready.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with child_process(
        name,
        _command(name, context, port),
        context.log_folder / f"{name}.log",
        cwd=_ROOT,
        environment=_environment(),
        speaks=name is SideName.BARE,
    ) as child:
        if name is SideName.BARE:
            yield _BareSide(child, context.load_seconds)
            return
        ready_path = "/ready" if name is SideName.GRAFT else "/health"
        await wait_until_ready(child, url + ready_path, context.ready_seconds)
        body = _graft_body if name is SideName.GRAFT else _mlx_lm_body
        yield _HttpSide(child, url, lambda question: body(context, question), context.load_seconds)


def _command(name: SideName, context: SideContext, port: int) -> list[str]:
    python, model = sys.executable, str(context.model_path)
    if name is SideName.BARE:
        return [python, "-m", "benchmarks.workers.bare_generator", model]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    if name is SideName.MLX_LM:
        return [python, "-m", "benchmarks.workers.mlx_lm_server", "--model", model, *address]
    roots = ["--adapters-dir", str(context.adapters[0].parent)] if context.adapters else []
    return [python, "-m", "server", "serve", model, "--served-model-name", _SERVED_NAME, *roots, *address]


def _environment() -> dict[str, str]:
    """The environment without the server's own settings: a benchmark measures the defaults."""
    return {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}


def _graft_body(context: SideContext, question: Question) -> dict[str, Any]:
    adapter = context.adapter(question)
    return {"model": _SERVED_NAME if adapter is None else adapter.name}


def _mlx_lm_body(context: SideContext, question: Question) -> dict[str, Any]:
    # Only with the model's path does it heed `adapters`; with "default_model" it ignores it silently.
    adapter = context.adapter(question)
    return {"model": str(context.model_path)} | ({} if adapter is None else {"adapters": str(adapter)})
