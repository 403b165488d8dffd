"""From a validated request to a run and the wording of its reply: resolve, pin, tokenise, submit.

The pin that a name resolves to is handed to the engine, which releases it when it has done with the last
generation of the request; whatever is refused before that releases it here. Knows no HTTP. Runs on the event
loop.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from adapters_core.routing import RowAdapters
from server.adapters.registry import Terms
from server.engine.messages import SamplingParams, Submit
from server.engine.model import ModelInfo
from server.errors import InvalidRequestError
from server.openai.choice import Choice
from server.openai.prompting import Prompter
from server.openai.responses import ChatReply, CompletionReply, Head, Reply
from server.openai.run import EventSource, Run, Submitter
from server.openai.sampling import sampling_params
from server.openai.text import TextDecoder
from server.openai.wire import ChatRequest, CompletionRequest, GenerationRequest

__all__ = ["Answer", "Resolver", "RowPin", "TextService"]

_T = TypeVar("_T")


class RowPin(Protocol):
    """What a name resolved to, and cannot change any more; `release` may be called more than once."""

    @property
    def row(self) -> RowAdapters: ...

    @property
    def served_name(self) -> str: ...

    def release(self) -> None: ...


class Resolver(Protocol):
    """What is needed of the adapters' life cycle."""

    async def resolve(self, model: str | None, adapters: Terms | None = None) -> RowPin: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """A request under way and how its reply is worded. Whoever gets it closes `run`."""

    run: Run
    reply: Reply


class TextService:
    """Answers chats and completions with one model. `max_n` bounds the choices for each prompt."""

    def __init__(
        self,
        engine: Submitter,
        adapters: Resolver,
        info: ModelInfo,
        *,
        default_max_tokens: int,
        max_n: int,
    ) -> None:
        self._engine = engine
        self._adapters = adapters
        self._info = info
        self._max_n = max_n
        self._decoder = TextDecoder(info.tokenizer)
        self._prompter = Prompter(
            info.tokenizer,
            context_tokens=info.context_tokens,
            vocabulary_tokens=info.vocabulary_tokens,
            default_max_tokens=default_max_tokens,
        )
        self._fingerprint = f"fp_{info.digest.removeprefix('sha256:')[:12]}"

    async def chat(self, request: ChatRequest) -> Answer:
        """Start answering a conversation.

        Raises:
            ApiError, LifeCycleError, AdapterError, EngineError: the request is refused, and nothing is
            left of it.
        """
        self._check_n(request.n)
        self._engine.check_room(request.n)  # before adapters are loaded, and others evicted, for nothing
        pin = _SharedPin(await self._resolve(request))
        try:
            prompt = await self._prompter.chat(request.messages)
            run = await self._start(request, [prompt], pin, prompt_param="messages", continues=False)
        finally:
            pin.release()
        head = self._head("chatcmpl", pin.served_name)
        return Answer(run, ChatReply(head, self._decoder.token_bytes, *_wishes(request)))

    async def complete(self, request: CompletionRequest) -> Answer:
        """Start completing one or more prompts. Raises as `chat`."""
        self._check_n(request.n)
        self._engine.check_room(len(request.prompts) * request.n)
        pin = _SharedPin(await self._resolve(request))
        try:
            tokens = [await self._prompter.completion(prompt) for prompt in request.prompts]
            run = await self._start(request, tokens, pin, prompt_param="prompt", continues=True)
        finally:
            pin.release()
        head = self._head("cmpl", pin.served_name)
        return Answer(run, CompletionReply(head, self._decoder.token_bytes, *_wishes(request)))

    def close(self) -> None:
        """End the tokenizer's thread."""
        self._prompter.close()

    async def _resolve(self, request: GenerationRequest) -> RowPin:
        terms = [(term.id, term.weight) for term in request.adapters]
        return await self._adapters.resolve(request.model, terms or None)

    def _check_n(self, n: int) -> None:
        if n > self._max_n:
            raise InvalidRequestError(f"'n' should be at most {self._max_n} here, but is {n}.", param="n")

    async def _start(
        self,
        request: GenerationRequest,
        prompts: Sequence[tuple[int, ...]],
        pin: _SharedPin,
        *,
        prompt_param: str,
        continues: bool,
    ) -> Run:
        """Submit every prompt, or none: if the engine refuses one, those before it are cancelled."""
        sampling = sampling_params(request, self._info.vocabulary_tokens)
        submits = [self._submit(request, prompt, pin.row, sampling, prompt_param) for prompt in prompts]
        streams = self._decoder.streams(len(prompts) * request.n, request.stop, continues=continues)
        choices = [Choice(index, stream) for index, stream in enumerate(streams)]
        generations: list[EventSource] = []
        try:
            for submit in submits:
                generations.append(
                    pin.lend(lambda release, submit=submit: self._engine.generate(submit, release))
                )
        except BaseException:
            for generation in generations:
                await generation.aclose()
            raise
        return Run(generations, choices, sum(map(len, prompts)))

    def _submit(
        self,
        request: GenerationRequest,
        prompt: tuple[int, ...],
        row: RowAdapters,
        sampling: SamplingParams,
        prompt_param: str,
    ) -> Submit:
        max_tokens = self._prompter.max_tokens(
            len(prompt),
            request.wanted_tokens,
            prompt_param=prompt_param,
            wanted_param=request.wanted_tokens_param,
        )
        return Submit(
            request_id=uuid.uuid4().hex,
            row=row,
            prompt_tokens=prompt,
            max_tokens=max_tokens,
            stop_token_ids=frozenset(self._info.tokenizer.eos_token_ids),
            sampling=sampling,
            choices=request.n,
        )

    def _head(self, prefix: str, served_name: str) -> Head:
        return Head(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), served_name, self._fingerprint)


def _wishes(request: GenerationRequest) -> tuple[bool, bool]:
    return request.includes_usage, request.wanted_logprobs is not None


class _SharedPin:
    """A pin that several hold; it is released when the last of them lets go. Made with one holder."""

    def __init__(self, pin: RowPin) -> None:
        self.row = pin.row
        self.served_name = pin.served_name
        self._release_all = pin.release
        self._holders = 1

    def lend(self, take: Callable[[Callable[[], None]], _T]) -> _T:
        """What `take` makes of one more hold, whose release it is given; if it raises, the hold is void."""
        self._holders += 1
        try:
            return take(self.release)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        self._holders -= 1
        if not self._holders:
            self._release_all()
