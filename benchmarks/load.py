"""The load generator: streams chat completions at once over HTTP and counts what came back.

Knows the OpenAI protocol and no particular server. It runs on the event loop, with no thread of its own.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.results import Answer, LoadResult

__all__ = ["LoadError", "run_load"]

_RETRY_SECONDS = 0.05

Body = Mapping[str, Any]


class LoadError(Exception):
    """A request that did not end as it should: then the load's time means nothing."""


class _Refused(Exception):
    """The connection failed before anything came back; asking again is safe."""


async def run_load(
    url: str, bodies: Sequence[Body], timeout_seconds: float, max_retries: int = 20
) -> LoadResult:
    """Send all `bodies` to `url` at once, as streams with usage, and wait for all to end.

    Every request has a connection of its own. One that is refused or reset before anything came back is
    tried again at most `max_retries` times, on the same clock.

    Raises: LoadError if a request fails, ends without usage, or all take longer than `timeout_seconds`.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    start = time.perf_counter()
    # Proxies from the environment are for other machines.
    async with httpx.AsyncClient(limits=limits, timeout=timeout_seconds, trust_env=False) as client:
        try:
            async with asyncio.timeout(timeout_seconds), asyncio.TaskGroup() as group:
                tasks = [group.create_task(_answer(client, url, body, start, max_retries)) for body in bodies]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        except TimeoutError:
            raise LoadError(
                f"expected {len(bodies)} requests to end within {timeout_seconds:g} seconds, they did not"
            ) from None
        return LoadResult(time.perf_counter() - start, tuple(task.result() for task in tasks))


async def _answer(client: httpx.AsyncClient, url: str, body: Body, start: float, max_retries: int) -> Answer:
    for retries in range(max_retries + 1):
        try:
            return await _stream(client, url, body, start, retries)
        except _Refused:
            await asyncio.sleep(_RETRY_SECONDS)
    raise LoadError(f"expected a connection to {url}, it was refused or reset {max_retries + 1} times")


@dataclass(slots=True)
class _Stream:
    """What has come back so far."""

    text: list[str] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    first_token_seconds: float | None = None
    begun: bool = False
    done: bool = False

    def add(self, data: str, seconds: float) -> None:
        """One event's data, which came `seconds` after the start."""
        if data == "[DONE]":
            self.done = True
            return
        chunk = json.loads(data)
        if "error" in chunk:
            raise LoadError(f"the server sent an error in a stream: {chunk['error']}")
        self.usage = chunk.get("usage") or self.usage
        text = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        if text and self.first_token_seconds is None:
            self.first_token_seconds = seconds
        self.text.append(text)

    def answer(self, seconds: float, retries: int) -> Answer:
        """The whole stream. Raises: LoadError if it is not whole."""
        if not self.done or self.usage is None or self.usage["completion_tokens"] < 1:
            raise LoadError(
                "expected a stream that ends with usage and [DONE] and has at least one token, got "
                f"usage {self.usage} and {'a' if self.done else 'no'} [DONE]"
            )
        details = self.usage.get("prompt_tokens_details") or {}
        return Answer(
            text="".join(self.text),
            prompt_tokens=self.usage["prompt_tokens"],
            cached_tokens=details.get("cached_tokens") or 0,
            completion_tokens=self.usage["completion_tokens"],
            # Tokens that are no text yet, such as part of a character, show at the end at the latest.
            first_token_seconds=seconds if self.first_token_seconds is None else self.first_token_seconds,
            seconds=seconds,
            retries=retries,
        )


async def _stream(client: httpx.AsyncClient, url: str, body: Body, start: float, retries: int) -> Answer:
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    stream = _Stream()
    try:
        async with client.stream("POST", url, json=streamed) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                raise LoadError(f"expected status 200, got {response.status_code}: {text[:500]}")
            async for line in response.aiter_lines():
                stream.begun = True
                if line.startswith("data:"):
                    stream.add(line.removeprefix("data:").strip(), time.perf_counter() - start)
    except httpx.TransportError as error:
        if stream.begun or isinstance(error, httpx.TimeoutException):
            raise LoadError(f"a request broke off: {error!r}") from error
        raise _Refused from error
    return stream.answer(time.perf_counter() - start, retries)
