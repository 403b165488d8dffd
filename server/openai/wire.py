"""What clients send to be answered, with every limit that can be checked without the model.

Knows neither model nor tokenizer: what depends on them (the vocabulary, the context) is checked in
sampling.py and prompting.py. Pure.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.openai.fields import (
    AdapterWeight,
    Count,
    Harmless,
    LogitBias,
    Penalty,
    Stop,
    TokenId,
    Wire,
    unsupported,
)
from server.openai.unsupported import IN_CHAT, IN_COMPARISONS, IN_COMPLETIONS, IN_MESSAGES

__all__ = [
    "ChatRequest",
    "CompareRequest",
    "CompletionRequest",
    "GenerationRequest",
    "Message",
    "SampledRequest",
    "StreamOptions",
    "TextPart",
]

_MAX_MESSAGES = 4096
_MAX_PROMPTS = 256
_MAX_CHOICES = 128
_MAX_COMPARED = 8
_MAX_TOP_LOGPROBS = 20
_PARTS_OF_OTHER_KINDS = frozenset(
    {
        "audio_url",
        "file",
        "image",
        "image_url",
        "input_audio",
        "input_file",
        "input_image",
        "refusal",
        "video_url",
    }
)


class StreamOptions(Wire):
    """How a stream is sent; keys of it that are not known change nothing in its meaning and are ignored."""

    include_usage: bool = False


_Name = Annotated[str, Field(max_length=300)]


class SampledRequest(Wire):
    """How long answers may get, how their tokens are chosen, and whether they are streamed."""

    max_tokens: Count | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias = Field(default_factory=dict)
    stop: Stop = Field(default_factory=list)
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> SampledRequest:
        if self.stream_options is not None and not self.stream:
            message = "is allowed only together with 'stream': true"
            raise PydanticCustomError("stream_options", message, {"param": "stream_options"})
        return self

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens that a choice may have, if the client said so."""
        return self.max_tokens

    @property
    def wanted_tokens_param(self) -> str:
        """The name under which the client said so."""
        return "max_tokens"

    @property
    def wanted_logprobs(self) -> int | None:
        """None: no log-probabilities; otherwise how many alternatives to each chosen token's."""
        raise NotImplementedError


class GenerationRequest(SampledRequest):
    """What chat and completions have in common."""

    model: _Name | None = None
    adapters: Annotated[list[AdapterWeight], Field(max_length=16, fail_fast=True)] = Field(
        default_factory=list
    )
    n: Annotated[int, Field(ge=1, le=_MAX_CHOICES)] = 1

    @model_validator(mode="after")
    def _check_adapters(self) -> GenerationRequest:
        ids = [term.id for term in self.adapters]
        if len(set(ids)) < len(ids):
            message = "should name each adapter once"
            raise PydanticCustomError("adapters", message, {"param": "adapters"})
        return self


class TextPart(Wire):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_kinds(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        if isinstance(kind, str) and kind in _PARTS_OF_OTHER_KINDS:
            raise unsupported(f"a content part of type '{kind}'", param="type")
        return given


def _kind_of_content(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<parts>" if isinstance(value, list) else None


def _refuse_tool_roles(role: Any) -> Any:
    if role in ("tool", "function"):
        raise unsupported(f"the role '{role}'")
    return role


class Message(Wire):
    """One message of a conversation. A developer's message is what older models call a system message."""

    refused: ClassVar[Harmless] = IN_MESSAGES

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_refuse_tool_roles)]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[TextPart], Field(fail_fast=True), Tag("<parts>")],
        Discriminator(
            _kind_of_content,
            custom_error_type="content_type",
            custom_error_message="should be a string or a list of text parts",
        ),
    ]
    name: Annotated[str, Field(max_length=128)] | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates want it: the parts of a content joined, a developer called system."""
        content = (
            self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        )
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": content}
        return message if self.name is None else {**message, "name": self.name}


class Conversation(SampledRequest):
    """Messages to be answered, with the two names that OpenAI has for the limit of an answer."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Count | None = None

    @model_validator(mode="after")
    def _check_limits(self) -> Conversation:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            message = "should equal 'max_completion_tokens', or only one of them be given"
            raise PydanticCustomError("max_tokens", message, {"param": "max_tokens"})
        return self

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_tokens_param(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class ChatRequest(Conversation, GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    refused: ClassVar[Harmless] = IN_CHAT

    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            message = "is allowed only together with 'logprobs': true"
            raise PydanticCustomError("top_logprobs", message, {"param": "top_logprobs"})
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompareRequest(Conversation):
    """The body of `POST /v1/compare`: each of `models` answers the same messages."""

    refused: ClassVar[Harmless] = IN_COMPARISONS

    models: Annotated[list[_Name], Field(min_length=2, max_length=_MAX_COMPARED, fail_fast=True)]

    @model_validator(mode="after")
    def _check_models(self) -> CompareRequest:
        if len(set(self.models)) < len(self.models):
            raise PydanticCustomError("models", "should name each model once", {"param": "models"})
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        return 0  # by which the tokens of an answer become known


def _kind_of_prompt(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    # What the first item is decides; the branch then says what is wrong with the others.
    first = value[0] if value else ""
    return "<texts>" if isinstance(first, str) else "<token lists>" if isinstance(first, list) else "<tokens>"


_Text = Annotated[str, Field(min_length=1)]
_Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
_Texts = Annotated[list[_Text], Field(min_length=1, max_length=_MAX_PROMPTS, fail_fast=True)]
_TokenLists = Annotated[list[_Tokens], Field(min_length=1, max_length=_MAX_PROMPTS, fail_fast=True)]


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`."""

    refused: ClassVar[Harmless] = IN_COMPLETIONS

    prompt: Annotated[
        Annotated[_Text, Tag("<text>")]
        | Annotated[_Texts, Tag("<texts>")]
        | Annotated[_Tokens, Tag("<tokens>")]
        | Annotated[_TokenLists, Tag("<token lists>")],
        Discriminator(
            _kind_of_prompt,
            custom_error_type="prompt_type",
            custom_error_message="should be a string, a list of token ids, or a list of either",
        ),
    ]
    logprobs: Annotated[int, Field(ge=0, le=_MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_best_of(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("best_of") not in (None, given.get("n") or 1):
            raise unsupported("'best_of' other than 'n'", param="best_of")
        return given

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself, a text or token ids."""
        match self.prompt:
            case str() as text:
                return [text]
            case [int(), *_] as tokens:
                return [tokens]  # pyright: ignore[reportReturnType]
            case several:
                return list(several)  # pyright: ignore[reportReturnType, reportArgumentType]

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs
