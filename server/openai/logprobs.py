"""Log-probabilities in JSON: OpenAI's two forms, and what others are made of. Knows no HTTP. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from server.openai.choice import Score

__all__ = ["chat_logprobs", "completion_logprobs", "finite", "token_object"]

# What JSON cannot say: minus infinity, of tokens that a bias has ruled out.
_LOWEST = -9999.0

TokenBytes = Callable[[int], bytes]


def chat_logprobs(scores: Sequence[Score], token_bytes: TokenBytes) -> dict[str, Any]:
    """`{"content": [{"token", "logprob", "bytes", "top_logprobs"}], "refusal": null}`."""
    content = []
    for score in scores:
        top = [_entry(token, logprob, token_bytes) for token, logprob in score.top]
        content.append({**_entry(score.token, score.logprob, token_bytes), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(scores: Sequence[Score], token_bytes: TokenBytes) -> dict[str, Any]:
    """`{"tokens", "token_logprobs", "top_logprobs", "text_offset"}`, lists of one length."""
    return {
        "tokens": [_text(token_bytes(score.token)) for score in scores],
        "token_logprobs": [finite(score.logprob) for score in scores],
        "top_logprobs": [
            {_text(token_bytes(token)): finite(logprob) for token, logprob in score.top} for score in scores
        ],
        "text_offset": [score.offset_chars for score in scores],
    }


def _entry(token: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    named = token_object(token, token_bytes)
    return {"token": named["token"], "logprob": finite(logprob), "bytes": named["bytes"]}


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def token_object(token: int, token_bytes: TokenBytes) -> dict[str, Any]:
    """`{"token", "bytes"}`: its text, as far as it is one, and what it stands for."""
    data = token_bytes(token)
    return {"token": _text(data), "bytes": list(data)}


def finite(logprob: float) -> float:
    """A number that JSON can say."""
    return max(logprob, _LOWEST)
