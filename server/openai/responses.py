"""The JSON that chat and completions answer with, whole or in chunks.

`ChatReply` and `CompletionReply` share one vocabulary, `Reply`, so that streaming.py and collect.py serve
both. They know no engine and no transport. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from server.openai.choice import Piece
from server.openai.logprobs import chat_logprobs, completion_logprobs
from server.openai.run import Usage

__all__ = ["ChatReply", "CompletionReply", "Head", "Reply", "usage_object"]


@dataclass(frozen=True, slots=True)
class Head:
    """What every chunk of a reply repeats. `created` is in seconds since 1970."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def fields(self, kind: str) -> dict[str, Any]:
        """The members that come first in an object of this kind."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


class Reply(Protocol):
    """How one endpoint words its answer."""

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """The chunks that come before any text."""
        ...

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """A piece as chunks: its text if it has any, and the end of its choice by itself."""
        ...

    def closing(self, usage: Usage) -> list[dict[str, Any]]:
        """The chunks that come after all text."""
        ...

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The answer in one, from one piece for each choice."""
        ...


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's `usage`, the cached tokens always in it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


@dataclass(frozen=True, slots=True)
class _Wording:
    """With `includes_usage`, chunks carry `usage`, null in all but the last."""

    head: Head
    token_bytes: Callable[[int], bytes]
    includes_usage: bool
    with_logprobs: bool

    def _chunk(self, kind: str, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        chunk = {**self.head.fields(kind), "choices": choices}
        if self.includes_usage:
            chunk["usage"] = None if usage is None else usage_object(usage)
        return chunk


class ChatReply(_Wording):
    """`POST /v1/chat/completions`."""

    def opening(self, choices: int) -> list[dict[str, Any]]:
        return [self._delta(index, {"role": "assistant", "content": ""}) for index in range(choices)]

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        chunks = []
        if piece.text or piece.scores:
            logprobs = self._logprobs(piece)
            chunks.append(self._delta(piece.choice, {"content": piece.text}, logprobs=logprobs))
        if piece.reason is not None:
            chunks.append(self._delta(piece.choice, {}, reason=piece.reason))
        return chunks

    def closing(self, usage: Usage) -> list[dict[str, Any]]:
        return [self._chunk("chat.completion.chunk", [], usage)] if self.includes_usage else []

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": piece.choice,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": self._logprobs(piece),
                "finish_reason": piece.reason,
            }
            for piece in pieces
        ]
        return {**self.head.fields("chat.completion"), "choices": choices, "usage": usage_object(usage)}

    def _delta(
        self, index: int, delta: dict[str, Any], *, logprobs: Any = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._chunk("chat.completion.chunk", [choice])

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        return chat_logprobs(piece.scores, self.token_bytes) if self.with_logprobs else None


class CompletionReply(_Wording):
    """`POST /v1/completions`, whose chunks look like its whole answer."""

    def opening(self, choices: int) -> list[dict[str, Any]]:
        return []

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        chunks = []
        if piece.text or piece.scores:
            part = Piece(piece.choice, piece.text, piece.scores)
            chunks.append(self._chunk("text_completion", [self._choice(part)]))
        if piece.reason is not None:
            end = {**self._choice(Piece(piece.choice, "", (), piece.reason)), "logprobs": None}
            chunks.append(self._chunk("text_completion", [end]))
        return chunks

    def closing(self, usage: Usage) -> list[dict[str, Any]]:
        return [self._chunk("text_completion", [], usage)] if self.includes_usage else []

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        choices = [self._choice(piece) for piece in pieces]
        return {**self.head.fields("text_completion"), "choices": choices, "usage": usage_object(usage)}

    def _choice(self, piece: Piece) -> dict[str, Any]:
        logprobs = completion_logprobs(piece.scores, self.token_bytes) if self.with_logprobs else None
        return {
            "index": piece.choice,
            "text": piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.reason,
        }
