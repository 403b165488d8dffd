"""From a validated request to a run and the wording of its reply: resolve, pin, tokenise, submit.

The pin that a name resolves to is handed to the engine, which releases it when it has done with the last
generation of the request; whatever is refused before that releases it here. Knows no HTTP. Runs on the event
loop.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from server.adapters.errors import AdaptersWithModelError, LifeCycleError
from server.adapters.pins import Terms
from server.engine.messages import SamplingParams, Submit
from server.engine.model import ModelInfo
from server.errors import InvalidRequestError
from server.openai.choice import Choice
from server.openai.pins import RowPin, SharedPin
from server.openai.prompting import Prompter
from server.openai.responses import ChatReply, CompletionReply, Head, Reply
from server.openai.run import EventSource, Run, Submitter
from server.openai.sampling import sampling_params
from server.openai.text import TextDecoder
from server.openai.wire import ChatRequest, CompletionRequest, GenerationRequest, SampledRequest

__all__ = ["Answer", "Resolver", "TextService"]


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
        self.info = info
        self._max_n = max_n
        self.decoder = TextDecoder(info.tokenizer)
        self.prompter = Prompter(
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
        pin = SharedPin(await self._resolve(request))
        try:
            prompt = await self.prompter.chat(request)
            continues = request.continue_final_message
            run = await self._start(request, [prompt], pin, prompt_param="messages", continues=continues)
        finally:
            pin.release()
        head = self.head("chatcmpl", pin.served_name)
        return Answer(run, ChatReply(head, self.decoder.token_bytes, *_wishes(request)))

    async def complete(self, request: CompletionRequest) -> Answer:
        """Start completing one or more prompts. Raises as `chat`."""
        self._check_n(request.n)
        self._engine.check_room(len(request.prompts) * request.n)
        pin = SharedPin(await self._resolve(request))
        try:
            tokens = [await self.prompter.completion(prompt) for prompt in request.prompts]
            run = await self._start(request, tokens, pin, prompt_param="prompt", continues=True)
        finally:
            pin.release()
        head = self.head("cmpl", pin.served_name)
        return Answer(run, CompletionReply(head, self.decoder.token_bytes, *_wishes(request)))

    def close(self) -> None:
        """End the tokenizer's thread."""
        self.prompter.close()

    async def _resolve(self, request: GenerationRequest) -> RowPin:
        try:
            return await self._adapters.resolve(request.model, request.terms or None)
        except AdaptersWithModelError as error:
            raise AdaptersWithModelError(error.model, error.base, request.terms_param) from None
        except LifeCycleError as error:
            if error.param == "adapters":  # as the client called it
                error.param = request.terms_param
            raise

    def _check_n(self, n: int) -> None:
        if n > self._max_n:
            raise InvalidRequestError(f"'n' should be at most {self._max_n} here, but is {n}.", param="n")

    async def _start(
        self,
        request: GenerationRequest,
        prompts: Sequence[tuple[int, ...]],
        pin: SharedPin,
        *,
        prompt_param: str,
        continues: bool,
    ) -> Run:
        """Submit every prompt, or none: if the engine refuses one, those before it are cancelled."""
        sampling = sampling_params(request, self.info.vocabulary_tokens)
        submits = [self.submit(request, prompt, pin, sampling, prompt_param, request.n) for prompt in prompts]
        streams = self.decoder.streams(len(prompts) * request.n, request.stop, continues=continues)
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

    def submit(
        self,
        request: SampledRequest,
        prompt: tuple[int, ...],
        pin: SharedPin,
        sampling: SamplingParams,
        prompt_param: str,
        choices: int = 1,
    ) -> Submit:
        """What the engine is asked for one prompt.

        Raises:
            ContextLengthError: the prompt, or what is wanted after it, is too long.
        """
        max_tokens = self.prompter.max_tokens(
            len(prompt),
            request.wanted_tokens,
            prompt_param=prompt_param,
            wanted_param=request.wanted_tokens_param,
        )
        return Submit(
            request_id=uuid.uuid4().hex,
            row=pin.row,
            prompt_tokens=prompt,
            max_tokens=max_tokens,
            stop_token_ids=frozenset(self.info.tokenizer.eos_token_ids),
            sampling=sampling,
            choices=choices,
            cache_owner=request.cache_salt or "",
            model=pin.served_name,
        )

    def head(self, prefix: str, served_name: str) -> Head:
        """What every chunk of a new reply repeats; its id begins with `prefix`."""
        return Head(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), served_name, self._fingerprint)


def _wishes(request: GenerationRequest) -> tuple[bool, bool]:
    return request.includes_usage, request.wanted_logprobs is not None
