"""What crosses the border between the event loop and the generation thread.

Inwards: Submit, Scoring, Cancel, Update, Stop. Outwards: Token, ChoiceFinished, Scored, and exactly one
Finished or Failed for each Submit and each Scoring, always last. All are immutable, so that either side may
keep them. No text here: tokens only.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from adapters_core.mixed.residents import RowAdapters

from .context import ModelContext

__all__ = [
    "SMALLEST_REPETITION_PENALTY",
    "Cancel",
    "ChoiceFinished",
    "Event",
    "Failed",
    "FailureKind",
    "FinishReason",
    "Finished",
    "Message",
    "SamplingParams",
    "Scored",
    "Scoring",
    "Stop",
    "Submit",
    "Token",
    "Update",
]

SMALLEST_REPETITION_PENALTY = 0.01
"""Logits are divided by it; what is smaller means nothing more, and ends in infinities."""

FinishReason = Literal["stop", "length"]

FailureKind = Literal["engine", "stopped", "not_finite"]
"""Why a request failed: an error of the engine, its stop, or the request's own logits, NaN or infinite."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token of a row is chosen.

    `temperature` 0 is greedy. `seed` makes a row's draws a function of the seed, the choice's index and
    the step alone, whatever else is in the batch. The repetition penalty (1 is none) looks back over prompt
    and completion; presence and frequency penalties over the completion alone. `top_logprobs` None returns
    no log-probabilities, 0 those of the chosen tokens alone.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Submit:
    """One request: `choices` continuations of one prompt, computed with one row of adapters.

    It shares prompt caches with requests of the same `cache_owner` alone. `model` is what logs and errors
    call what it computes with.
    """

    request_id: str
    row: RowAdapters
    prompt_tokens: tuple[int, ...]
    max_tokens: int
    stop_token_ids: frozenset[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    choices: int = 1
    cache_owner: str = ""
    model: str = ""

    @property
    def most_events(self) -> int:
        """What it can be answered with at most."""
        return self.choices * (self.max_tokens + 1) + 1

    @property
    def most_tokens(self) -> int:
        """How long its rows can get."""
        return len(self.prompt_tokens) + self.max_tokens


@dataclass(frozen=True, slots=True)
class Scoring:
    """One request to say how likely each of `answers` is after one prompt, under one row of adapters.

    The prompt and each answer have at least one token. An answer takes a row, as a choice does. It shares
    prompt caches with requests of the same `cache_owner` alone. `model` is as in `Submit`.
    """

    request_id: str
    row: RowAdapters
    prompt_tokens: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    cache_owner: str = ""
    model: str = ""

    @property
    def choices(self) -> int:
        """How many rows it takes."""
        return len(self.answers)

    @property
    def most_events(self) -> int:
        """What it can be answered with at most."""
        return len(self.answers) + 1

    @property
    def most_tokens(self) -> int:
        """How long its rows can get."""
        return len(self.prompt_tokens) + max(map(len, self.answers))


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop computing a request (`choice` None) or one of its choices, or of its answers to be scored.

    A cancelled request still ends in Finished; a cancelled choice in ChoiceFinished with "stop". Of a
    cancelled answer nothing more is said.
    """

    request_id: str
    choice: int | None = None


@dataclass(frozen=True, slots=True)
class Update:
    """Run `fn` on the generation thread between two steps and put what comes of it into `future`.

    With `drain`, no request is admitted any more, those being computed finish first, then `fn` runs.
    """

    fn: Callable[[ModelContext], Any]
    future: Future[Any]
    drain: bool = False


@dataclass(frozen=True, slots=True)
class Stop:
    """End the thread: what it has been given goes on for at most `timeout_seconds`, the rest fails."""

    timeout_seconds: float


Message = Submit | Scoring | Cancel | Update | Stop


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token of one choice; a stop token is never sent.

    `logprob` (natural logarithm) and `top` ((token, logprob) pairs, most likely first) are there when
    the request asked for them.
    """

    choice: int
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceFinished:
    """A choice will send no more tokens. `completion_tokens` counts the stop token, as OpenAI does."""

    choice: int
    reason: FinishReason
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Scored:
    """The natural log-probability of each token of the answer at position `answer`, given all before it.

    It is the log-softmax of the logits as they are, whatever the tokens were chosen by.
    """

    answer: int
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The request ended as it should (also by Cancel). `cached_tokens` of the prompt were not recomputed."""

    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended for what `kind` says; nothing more is computed for it."""

    message: str
    kind: FailureKind = "engine"


Event = Token | ChoiceFinished | Scored | Finished | Failed
