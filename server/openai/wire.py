"""What clients send to be answered, with every limit that can be checked without the model.

Knows neither model nor tokenizer: what depends on them (the vocabulary, the context) is checked in
sampling.py and prompting.py. Pure.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from server.engine.messages import SMALLEST_REPETITION_PENALTY
from server.openai.fields import (
    AdapterName,
    Limit,
    LogitBias,
    OneOrMoreAdapters,
    Penalty,
    Stop,
    Tokens,
    Whole,
    Wire,
    problem,
    unsupported,
)
from server.openai.parameters import Vocabulary, vocabulary

__all__ = [
    "ChatRequest",
    "CompareRequest",
    "CompletionRequest",
    "GenerationRequest",
    "Message",
    "SampledRequest",
    "StreamOptions",
    "TemplateOptions",
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
    """How a stream is sent."""

    vocabulary: ClassVar[Vocabulary] = vocabulary("stream_options")

    include_usage: bool = False


_Name = Annotated[str, Field(max_length=300)]


class SampledRequest(Wire):
    """How long answers may get, how their tokens are chosen, and whether they are streamed."""

    limits: ClassVar[tuple[str, ...]] = ("max_tokens", "max_new_tokens", "n_predict")
    """The names that servers have for the limit of an answer."""

    max_tokens: Limit | None = None
    max_new_tokens: Limit | None = None
    n_predict: Limit | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    """At 0 the likeliest token alone is left: the least number of tokens that a share can have."""
    top_k: Annotated[Whole, Field(ge=-1, le=2**31 - 1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    """-1 as if there were none."""
    repetition_penalty: Annotated[float, Field(ge=SMALLEST_REPETITION_PENALTY, le=2)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias = Field(default_factory=dict)
    stop: Stop = Field(default_factory=list)
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> SampledRequest:
        if self.stream_options is not None and not self.stream:
            raise problem("stream_options", "is allowed only together with 'stream': true")
        return self

    @model_validator(mode="after")
    def _check_limits(self) -> SampledRequest:
        given = self._given_limits
        if len(set(given.values())) > 1:
            first, second, *_ = given
            raise problem(second, "should equal '{other}', or only one of them be given", other=first)
        return self

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wanted_tokens(self) -> int | None:
        """The most tokens that a choice may have, if the client said so; `NO_LIMIT`: all that fit."""
        return next(iter(self._given_limits.values()), None)

    @property
    def wanted_tokens_param(self) -> str:
        """The name under which the client said so."""
        return next(iter(self._given_limits), self.limits[0])

    @property
    def wanted_logprobs(self) -> int | None:
        """None: no log-probabilities; otherwise how many alternatives to each chosen token's."""
        raise NotImplementedError

    @property
    def _given_limits(self) -> dict[str, int]:
        values = {name: getattr(self, name) for name in self.limits}
        return {name: value for name, value in values.items() if value is not None}


class GenerationRequest(SampledRequest):
    """What chat and completions have in common."""

    model: _Name | None = None
    adapters: OneOrMoreAdapters = Field(default_factory=list)
    lora_path: AdapterName | None = None
    """SGLang's name for `adapters` with one of weight 1."""
    adapter_id: AdapterName | None = None
    """LoRAX's name for the same."""
    n: Annotated[Whole, Field(ge=1, le=_MAX_CHOICES)] = 1

    @model_validator(mode="after")
    def _check_adapters(self) -> GenerationRequest:
        ids = [term.id for term in self.adapters]
        if len(set(ids)) < len(ids):
            raise problem("adapters", "should name each adapter once")
        named = [name for name in ("lora_path", "adapter_id", "adapters") if getattr(self, name)]
        if len(named) > 1:
            raise problem(named[0], "cannot be given together with '{other}'", other=named[1])
        return self

    @property
    def terms(self) -> list[tuple[str, float]]:
        """(id, weight) of each adapter that is named beside `model`."""
        named = self.lora_path or self.adapter_id
        if named is not None:
            return [] if named == self.model else [(named, 1.0)]
        return [(term.id, term.weight) for term in self.adapters]

    @property
    def terms_param(self) -> str:
        """The name under which the client named them."""
        return "lora_path" if self.lora_path else "adapter_id" if self.adapter_id else "adapters"


class TextPart(Wire):
    """A piece of a message's content."""

    vocabulary: ClassVar[Vocabulary] = vocabulary("part")

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

    vocabulary: ClassVar[Vocabulary] = vocabulary("message")

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
    reasoning_content: str | None = None
    """What an assistant thought: for the chat template, which may leave it out."""
    reasoning: str | None = None
    """Another name for it."""

    @model_validator(mode="before")
    @classmethod
    def _let_assistants_say_nothing(cls, given: Any) -> Any:
        is_empty = (
            isinstance(given, dict) and given.get("role") == "assistant" and given.get("content") is None
        )
        return {**given, "content": ""} if is_empty else given

    @model_validator(mode="after")
    def _check_reasoning(self) -> Message:
        if None not in (self.reasoning, self.reasoning_content) and self.reasoning != self.reasoning_content:
            raise problem("reasoning", "should equal 'reasoning_content', or only one of them be given")
        return self

    def for_template(self) -> dict[str, str]:
        """As chat templates want it: the parts of a content joined, a developer called system."""
        content = (
            self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        )
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        reasoning = self.reasoning_content or self.reasoning
        further = {"name": self.name, "reasoning_content": reasoning}
        return message | {key: value for key, value in further.items() if value is not None}


class TemplateOptions(Wire):
    """What is said to the chat template beside the messages."""

    vocabulary: ClassVar[Vocabulary] = vocabulary("chat_template_kwargs", is_closed=True)

    enable_thinking: bool | None = None


class Conversation(SampledRequest):
    """Messages to be answered, and how the chat template makes a prompt of them."""

    limits: ClassVar[tuple[str, ...]] = ("max_completion_tokens", *SampledRequest.limits)

    messages: Annotated[list[Message], Field(min_length=1, max_length=_MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Limit | None = None
    add_generation_prompt: bool | None = None
    """Whether the prompt opens an answer; true when left out, unless the last message is continued."""
    continue_final_message: bool = False
    """Whether the answer goes on with the text of the last message."""
    chat_template_kwargs: TemplateOptions = Field(default_factory=TemplateOptions)

    @model_validator(mode="after")
    def _check_end_of_prompt(self) -> Conversation:
        if self.continue_final_message and self.add_generation_prompt:
            message = "cannot be true together with 'add_generation_prompt': an answer goes on, or begins"
            raise problem("continue_final_message", message)
        return self


class ChatRequest(Conversation, GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    vocabulary: ClassVar[Vocabulary] = vocabulary("request", "chat")

    logprobs: bool = False
    top_logprobs: Annotated[Whole, Field(ge=0, le=_MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise problem("top_logprobs", "is allowed only together with 'logprobs': true")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompareRequest(Conversation):
    """The body of `POST /v1/compare`: each of `models` answers the same messages."""

    vocabulary: ClassVar[Vocabulary] = vocabulary("request", "chat", is_closed=True)

    models: Annotated[list[_Name], Field(min_length=2, max_length=_MAX_COMPARED, fail_fast=True)]

    @model_validator(mode="after")
    def _check_models(self) -> CompareRequest:
        if len(set(self.models)) < len(self.models):
            raise problem("models", "should name each model once")
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
_Texts = Annotated[list[_Text], Field(min_length=1, max_length=_MAX_PROMPTS, fail_fast=True)]
_TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=_MAX_PROMPTS, fail_fast=True)]


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`."""

    vocabulary: ClassVar[Vocabulary] = vocabulary("request", "completions")

    prompt: Annotated[
        Annotated[_Text, Tag("<text>")]
        | Annotated[_Texts, Tag("<texts>")]
        | Annotated[Tokens, Tag("<tokens>")]
        | Annotated[_TokenLists, Tag("<token lists>")],
        Discriminator(
            _kind_of_prompt,
            custom_error_type="prompt_type",
            custom_error_message="should be a string, a list of token ids, or a list of either",
        ),
    ]
    logprobs: Annotated[Whole, Field(ge=0, le=_MAX_TOP_LOGPROBS)] | None = None

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
