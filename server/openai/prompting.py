"""From messages and prompts to tokens, and whether they fit into the model's context.

The tokenizer of a model is not safe on two threads at once: this module has a copy of it and a single
thread of its own that uses it. Knows no HTTP route and no adapter.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import takewhile
from typing import TypeVar

from jinja2 import TemplateError
from mlx_lm.tokenizer_utils import TokenizerWrapper

from server.errors import ContextLengthError, InvalidRequestError
from server.openai.fields import NO_LIMIT
from server.openai.wire import Conversation

__all__ = ["Prompter"]

_T = TypeVar("_T")


class Prompter:
    """Makes prompts for one model.

    `context_tokens` bounds a prompt and its completion together, `vocabulary_tokens` the ids of a prompt that
    comes as tokens; `default_max_tokens` is how long a completion may get if the client does not say.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        *,
        context_tokens: int,
        vocabulary_tokens: int,
        default_max_tokens: int,
    ) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._context_tokens = context_tokens
        self._vocabulary_tokens = vocabulary_tokens
        self._default_max_tokens = default_max_tokens
        self._longest_token_chars = max(map(len, tokenizer.get_vocab()), default=1)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    async def chat(self, request: Conversation) -> tuple[int, ...]:
        """The tokens of a conversation in the model's chat template, up to where the answer begins.

        Raises:
            InvalidRequestError: the model has no chat template, or its template refuses the messages.
            ContextLengthError: the text is so long that its tokens cannot fit.
        """
        if not self._tokenizer.has_chat_template:
            message = "This model has no chat template, so that it cannot chat. Use /v1/completions instead."
            raise InvalidRequestError(message, param="model", code="no_chat_template")
        messages = [message.for_template() for message in request.messages]
        self._check_chars(sum(len(text) for message in messages for text in message.values()), "messages")
        continues = request.continue_final_message
        opens = not continues if request.add_generation_prompt is None else request.add_generation_prompt
        options: dict[str, bool] = {"add_generation_prompt": opens, "continue_final_message": continues}
        if request.chat_template_kwargs.enable_thinking is not None:
            options["enable_thinking"] = request.chat_template_kwargs.enable_thinking
        return await self._on_thread(lambda: self._render(messages, options))

    async def completion(self, prompt: str | list[int]) -> tuple[int, ...]:
        """The tokens of a text, with those that the model wants at its start, or the given tokens.

        Raises:
            InvalidRequestError: no tokens at all, or ids that the vocabulary does not have.
            ContextLengthError: the text is so long that its tokens cannot fit.
        """
        if isinstance(prompt, str):
            self._check_chars(len(prompt), "prompt")
            tokens = await self._on_thread(lambda: tuple(self._tokenizer.encode(prompt)))
        else:
            tokens = tuple(prompt)
            self._check_ids(tokens)
        if not tokens:
            raise InvalidRequestError("'prompt' is empty: it has no tokens.", param="prompt")
        return tokens

    def max_tokens(
        self, prompt_tokens: int, wanted: int | None, *, prompt_param: str, wanted_param: str
    ) -> int:
        """How many tokens a completion may have after a prompt of `prompt_tokens`.

        That many as `wanted`, or as there is room for if that is `NO_LIMIT`; without a wish the default, or
        what room there is if that is less.

        Raises:
            ContextLengthError: the prompt leaves no room, or less than is wanted.
        """
        room = self._context_tokens - prompt_tokens
        if room < 1:
            problem = (
                f"the prompt is too long: it has {prompt_tokens} tokens and must leave room for one more"
            )
            raise ContextLengthError(self._context_tokens, problem, prompt_param)
        if wanted == NO_LIMIT:
            return room
        if wanted is not None and wanted > room:
            advice = (
                "The prompt is too long for that; reduce either"
                if wanted < self._context_tokens
                else "Reduce the completion"
            )
            problem = (
                f"you requested {prompt_tokens + wanted} tokens: {prompt_tokens} in the prompt and {wanted} "
                f"for the completion. {advice}"
            )
            raise ContextLengthError(self._context_tokens, problem, wanted_param)
        return min(self._default_max_tokens, room) if wanted is None else wanted

    def close(self) -> None:
        """End the thread; prompts that wait for it are dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _on_thread(self, fn: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, fn)

    def _render(self, messages: list[dict[str, str]], options: dict[str, bool]) -> tuple[int, ...]:
        """Leading system messages are joined where the template takes one. Raises InvalidRequestError."""
        try:
            return self._rendered(messages, options)
        except TemplateError as error:
            joined = _with_one_system_message(messages)
            if joined is not None:
                with suppress(TemplateError):
                    return self._rendered(joined, options)
            message = f"The model's chat template refuses these messages: {error}"
            raise InvalidRequestError(message, param="messages", code="chat_template_error") from None

    def _rendered(self, messages: list[dict[str, str]], options: dict[str, bool]) -> tuple[int, ...]:
        try:
            self._check_system_messages(messages, options)
            return tuple(self._tokenizer.apply_chat_template(messages, **options))  # pyright: ignore
        except TemplateError:
            raise
        except ValueError:
            if not options["continue_final_message"]:
                raise
            message = "The model's chat template does not show the last message as it is, so it cannot go on."
            raise InvalidRequestError(message, param="continue_final_message") from None

    def _check_system_messages(self, messages: list[dict[str, str]], options: dict[str, bool]) -> None:
        """Raise TemplateError if the template leaves one of several out, which it would not say."""
        texts = [message["content"].strip() for message in messages if message["role"] == "system"]
        if len(texts) > 1:
            shown = self._tokenizer.apply_chat_template(messages, tokenize=False, **options)
            if any(text not in shown for text in texts):
                raise TemplateError("it leaves out a system message.")

    def _check_chars(self, chars: int, param: str) -> None:
        """Refuse, before any work, what is too long even if each token were the vocabulary's longest."""
        least_tokens = chars // self._longest_token_chars
        if least_tokens > self._context_tokens:
            problem = f"the prompt is too long: it has at least {least_tokens} tokens"
            raise ContextLengthError(self._context_tokens, problem, param)

    def _check_ids(self, tokens: Sequence[int]) -> None:
        largest = max(tokens, default=0)
        if largest >= self._vocabulary_tokens:
            message = f"'prompt' should have token ids below {self._vocabulary_tokens}, but has {largest}."
            raise InvalidRequestError(message, param="prompt")


def _with_one_system_message(messages: list[dict[str, str]]) -> list[dict[str, str]] | None:
    """The first messages, as many as are system ones, as one; None if they are one already, or none."""
    system = list(takewhile(lambda message: message["role"] == "system", messages))
    if len(system) < 2:
        return None
    content = "\n\n".join(message["content"] for message in system)
    return [{"role": "system", "content": content}, *messages[len(system) :]]
