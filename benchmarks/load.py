"""The load generator: streams chat completions over HTTP, some or all at once, and notes what came when.

Knows the OpenAI protocol and no particular server. It runs on the event loop, with no thread of its own.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx

__all__ = ["Answer", "LoadError", "LoadResult", "run_load"]

_RETRY_SECONDS = 0.05

Body = Mapping[str, Any]


class LoadError(Exception):
    """A request that did not end as it should: then the load's time means nothing."""


class _Refused(Exception):
    """The connection failed before anything came back; asking again is safe."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's end. All times run from the start of the whole load.

    `text_seconds` are the arrivals of its pieces of text, which are tokens, but for those that are no text of
    their own, such as part of a character; `retries` are refused connections.
    """

    text: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    started_seconds: float
    text_seconds: tuple[float, ...]
    ended_seconds: float
    retries: int = 0

    @property
    def first_token_seconds(self) -> float:
        """From the request's start to its first text, or to its end if there was none."""
        return (self.text_seconds or (self.ended_seconds,))[0] - self.started_seconds

    @property
    def seconds(self) -> float:
        """From the request's start to its end."""
        return self.ended_seconds - self.started_seconds

    @property
    def gap_seconds(self) -> list[float]:
        """From each piece of text to the next."""
        return [later - earlier for earlier, later in pairwise(self.text_seconds)]


@dataclass(frozen=True, slots=True)
class LoadResult:
    """One load, from the first request's start to the last one's end; answers as the requests were given.

    `origin_seconds` is the load's start on the clock of this process' `time.perf_counter`.
    """

    seconds: float
    answers: tuple[Answer, ...]
    origin_seconds: float = 0.0

    @property
    def completion_tokens(self) -> int:
        """Tokens that were really produced, as the side counts them."""
        return sum(answer.completion_tokens for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        """Produced tokens of all requests over the time that all took."""
        return self.completion_tokens / self.seconds


async def run_load(
    url: str,
    bodies: Sequence[Body],
    timeout_seconds: float,
    *,
    in_flight: int | None = None,
    arrivals: Sequence[float] = (),
    heard: Callable[[int], None] = lambda index: None,
    max_retries: int = 20,
) -> LoadResult:
    """Send all `bodies` to `url` as streams with usage and wait for all to end.

    `in_flight` of them at a time, the next as soon as one ends; by default all at once, or each at its second
    of `arrivals`, which ascend. `heard` is called for each piece of text, with the request's number. Every
    request has a connection of its own. One that is refused or reset before anything came back is tried
    again at most `max_retries` times, on the same clock.

    Raises: LoadError if a request fails, ends without usage, or all take longer than `timeout_seconds`.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    answers: dict[int, Answer] = {}
    # Proxies from the environment are for other machines.
    async with httpx.AsyncClient(limits=limits, timeout=timeout_seconds, trust_env=False) as client:
        start = time.perf_counter()
        asking = _Asking(client, url, start, heard, max_retries)
        seconds = arrivals or [0.0] * len(bodies)
        waiting = iter(list(zip(range(len(bodies)), seconds, bodies, strict=True)))
        try:
            async with asyncio.timeout(timeout_seconds), asyncio.TaskGroup() as group:
                for _ in range(in_flight or len(bodies)):
                    group.create_task(_ask_in_turn(asking, waiting, answers))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        except TimeoutError:
            raise LoadError(
                f"expected {len(bodies)} requests to end within {timeout_seconds:g} seconds, they did not"
            ) from None
        seconds = time.perf_counter() - start
    return LoadResult(seconds, tuple(answers[index] for index in range(len(bodies))), start)


@dataclass(frozen=True, slots=True)
class _Asking:
    """What all requests of a load share; `start` is on the clock of `time.perf_counter`."""

    client: httpx.AsyncClient
    url: str
    start: float
    heard: Callable[[int], None]
    max_retries: int

    def now(self) -> float:
        return time.perf_counter() - self.start


async def _ask_in_turn(
    asking: _Asking, waiting: Iterator[tuple[int, float, Body]], answers: dict[int, Answer]
) -> None:
    for index, arrives_seconds, body in waiting:
        if (left_seconds := arrives_seconds - asking.now()) > 0:
            await asyncio.sleep(left_seconds)
        answers[index] = await _answer(asking, index, body)


async def _answer(asking: _Asking, index: int, body: Body) -> Answer:
    stream = _Stream(asking.now())
    for stream.retries in range(asking.max_retries + 1):
        try:
            await _read(asking, index, body, stream)
            return stream.answer(asking.now())
        except _Refused:
            await asyncio.sleep(_RETRY_SECONDS)
    raise LoadError(
        f"expected a connection to {asking.url}, it was refused or reset {asking.max_retries + 1} times"
    )


@dataclass(slots=True)
class _Stream:
    """What has come back so far."""

    started_seconds: float
    retries: int = 0
    text: list[str] = field(default_factory=list)
    text_seconds: list[float] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    begun: bool = False
    done: bool = False

    def add(self, data: str, seconds: float) -> bool:
        """One event's data, which came `seconds` after the load's start; returns whether it has text."""
        if data == "[DONE]":
            self.done = True
            return False
        chunk = json.loads(data)
        if "error" in chunk:
            raise LoadError(f"the server sent an error in a stream: {chunk['error']}")
        self.usage = chunk.get("usage") or self.usage
        text = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        if text:
            self.text.append(text)
            self.text_seconds.append(seconds)
        return bool(text)

    def answer(self, seconds: float) -> Answer:
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
            started_seconds=self.started_seconds,
            text_seconds=tuple(self.text_seconds),
            ended_seconds=seconds,
            retries=self.retries,
        )


async def _read(asking: _Asking, index: int, body: Body, stream: _Stream) -> None:
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with asking.client.stream("POST", asking.url, json=streamed) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode(errors="replace")
                raise LoadError(f"expected status 200, got {response.status_code}: {text[:500]}")
            async for line in response.aiter_lines():
                stream.begun = True
                if line.startswith("data:") and stream.add(line.removeprefix("data:").strip(), asking.now()):
                    asking.heard(index)
    except httpx.TransportError as error:
        if stream.begun or isinstance(error, httpx.TimeoutException):
            raise LoadError(f"a request broke off: {error!r}") from error
        raise _Refused from error
