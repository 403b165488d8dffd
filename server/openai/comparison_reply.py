"""The JSON that a comparison is answered with, whole or in chunks. Knows no engine and no transport. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from server.openai.choice import Piece
from server.openai.comparison import AnswerScores
from server.openai.logprobs import finite, token_object
from server.openai.responses import usage_object
from server.openai.run import Usage

__all__ = ["CompareReply"]


@dataclass(frozen=True, slots=True)
class CompareReply:
    """`POST /v1/compare`. `created` is in seconds since 1970.

    `models` are the names as they were asked for, `served_names` what they meant. Chunks are like chat's,
    `index` being the position in `models`; with `includes_usage` they carry `usage`, null but in the last.
    """

    id: str
    created: int
    system_fingerprint: str
    models: tuple[str, ...]
    served_names: tuple[str, ...]
    token_bytes: Callable[[int], bytes]
    includes_usage: bool

    def opening(self, choices: int) -> list[dict[str, Any]]:
        """The chunks that come before any text, one for each answer."""
        return [self._delta(index, {"role": "assistant", "content": ""}) for index in range(choices)]

    def chunks(self, piece: Piece | AnswerScores) -> list[dict[str, Any]]:
        """A piece of an answer, and its end by itself; or an answer's scores."""
        if isinstance(piece, AnswerScores):
            return [self._delta(piece.choice, {}, scores=self._scores(piece))]
        chunks = []
        if piece.text:
            chunks.append(self._delta(piece.choice, {"content": piece.text}))
        if piece.reason is not None:
            chunks.append(self._delta(piece.choice, {}, reason=piece.reason))
        return chunks

    def closing(self, usage: Usage) -> list[dict[str, Any]]:
        """The chunks that come after everything."""
        return [self._chunk([], usage)] if self.includes_usage else []

    def whole(self, pieces: Sequence[Piece], scores: Sequence[AnswerScores], usage: Usage) -> dict[str, Any]:
        """The answer in one, from one piece and one AnswerScores for each model, in their order."""
        answers = [
            {
                "index": piece.choice,
                "model": self.served_names[piece.choice],
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "finish_reason": piece.reason,
                **self._scores(scored),
            }
            for piece, scored in zip(pieces, scores, strict=True)
        ]
        return {**self._head("comparison"), "answers": answers, "usage": usage_object(usage)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "models": list(self.models),
            "system_fingerprint": self.system_fingerprint,
        }

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        reason: str | None = None,
        scores: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        named = {"index": index, "model": self.served_names[index]}
        return self._chunk([{**named, "delta": delta, "finish_reason": reason, **(scores or {})}])

    def _chunk(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> dict[str, Any]:
        chunk = {**self._head("comparison.chunk"), "choices": choices}
        if self.includes_usage:
            chunk["usage"] = None if usage is None else usage_object(usage)
        return chunk

    def _scores(self, scores: AnswerScores) -> dict[str, Any]:
        by_model = [[finite(logprob) for logprob in logprobs] for logprobs in scores.logprobs]
        means = [_mean(logprobs) for logprobs in by_model]
        own = means[scores.choice]
        return {
            "tokens": [
                {**token_object(token, self.token_bytes), "logprobs": [logprobs[at] for logprobs in by_model]}
                for at, token in enumerate(scores.tokens)
            ],
            "mean_logprobs": means,
            "mean_differences": [None if mean is None or own is None else mean - own for mean in means],
        }


def _mean(logprobs: Sequence[float]) -> float | None:
    return sum(logprobs) / len(logprobs) if logprobs else None
