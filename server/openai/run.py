"""A request being computed: the generations of its prompts, as one sequence of pieces of text.

Several prompts of one request are several generations; their choices are numbered through. Knows the engine's
events and no HTTP. Runs on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.engine.messages import ChoiceFinished, Event, Failed, Finished, Submit, Token
from server.errors import GenerationFailedError, ServerStoppingError
from server.openai.choice import Choice, Piece

__all__ = ["EventSource", "Events", "Run", "Submitter", "Usage"]


class EventSource(Protocol):
    """What a Run needs of the engine's Generation."""

    def cancel_choice(self, choice: int) -> None: ...

    def __aiter__(self) -> AsyncIterator[Event]: ...

    async def aclose(self) -> None: ...


class Submitter(Protocol):
    """What is needed of the engine."""

    def check_room(self, choices: int) -> None: ...

    def generate(self, submit: Submit, on_end: Callable[[], None]) -> EventSource: ...


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took. A prompt counts once however many choices continue it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Events:
    """The events of several generations as one sequence, until the last has finished.

    Whoever has it closes it: that cancels what is still being computed.
    """

    def __init__(self, generations: Sequence[EventSource]) -> None:
        self._generations = tuple(generations)
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._readers: list[asyncio.Task[None]] = []

    async def each(self, idle_seconds: float | None = None) -> AsyncIterator[tuple[int, Event] | None]:
        """(Which generation, event) as they come; None whenever nothing has come for `idle_seconds`.

        Raises:
            GenerationFailedError: the engine gave a generation up.
            ServerStoppingError: because it stops.
        """
        self._readers = [asyncio.create_task(self._read(index)) for index in range(len(self._generations))]
        running = len(self._generations)
        while running:
            try:
                async with asyncio.timeout(idle_seconds):
                    index, event = await self._events.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(event, Failed):
                if event.kind == "stopped":
                    raise ServerStoppingError
                raise GenerationFailedError(event.message, event.kind)
            running -= isinstance(event, Finished)
            yield index, event

    def cancel_choice(self, index: int, choice: int) -> None:
        """Stop a choice of one generation."""
        self._generations[index].cancel_choice(choice)

    async def aclose(self) -> None:
        """Cancel what has not ended; never waits, so that it works in a task that is being cancelled."""
        for reader in self._readers:
            reader.cancel()
        for generation in self._generations:
            await generation.aclose()

    async def _read(self, index: int) -> None:
        async for event in self._generations[index]:
            self._events.put_nowait((index, event))


class Run:
    """The pieces of a request as they come.

    `choices` holds those of the first generation, then those of the second, and so on, equally many of each.
    Whoever has a Run closes it: that cancels what is still being computed.
    """

    def __init__(
        self, generations: Sequence[EventSource], choices: Sequence[Choice], prompt_tokens: int
    ) -> None:
        self.choices = tuple(choices)
        self._events = Events(generations)
        self._choices_each = len(choices) // len(generations)
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = 0

    @property
    def usage(self) -> Usage:
        """What the request has taken so far; all of it once the pieces have come to their end."""
        completion_tokens = sum(choice.completion_tokens for choice in self.choices)
        return Usage(self._prompt_tokens, completion_tokens, self._cached_tokens)

    async def pieces(self, idle_seconds: float | None = None) -> AsyncIterator[Piece | None]:
        """Every piece of every choice; None whenever nothing has come for `idle_seconds`.

        Raises:
            GenerationFailedError: the engine gave a generation up.
            ServerStoppingError: because it stops.
        """
        async for found in self._events.each(idle_seconds):
            match found:
                case None:
                    yield None
                case index, Token() | ChoiceFinished() as event:
                    piece = self._apply(index, event)
                    if piece is not None:
                        yield piece
                case _, Finished(cached_tokens):
                    self._cached_tokens += cached_tokens

    async def aclose(self) -> None:
        """Cancel what has not ended; never waits, so that it works in a task that is being cancelled."""
        await self._events.aclose()

    def _apply(self, index: int, event: Token | ChoiceFinished) -> Piece | None:
        choice = self.choices[index * self._choices_each + event.choice]
        if isinstance(event, ChoiceFinished):
            return choice.end(event)
        piece = choice.add(event)
        if piece is not None and piece.reason is not None:
            self._events.cancel_choice(index, event.choice)
        return piece
