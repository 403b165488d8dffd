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
    """`{"tokens", "token_logprobs", "top_logprobs", "text_offset"}`, lists of one length.

    `text_offset` counts characters from the beginning of the choice's text.
    """
    return {
        "tokens": [_text(token_bytes(score.token)) for score in scores],
        "token_logprobs": [finite(score.logprob) for score in scores],
        "top_logprobs": [_alternatives(score, token_bytes) for score in scores],
        "text_offset": [score.offset_chars for score in scores],
    }


def _entry(token: int, logprob: float, token_bytes: TokenBytes) -> dict[str, Any]:
    named = token_object(token, token_bytes)
    return {"token": named["token"], "logprob": finite(logprob), "bytes": named["bytes"]}


def _alternatives(score: Score, token_bytes: TokenBytes) -> dict[str, float]:
    """The likeliest tokens and the chosen one, by text, the likeliest first.

    Of tokens with one text the chosen one has it for its name, else the likeliest; others are named by id.
    """
    named = {_text(token_bytes(score.token)): finite(score.logprob)}
    for token, logprob in score.top:
        if token != score.token:
            text = _text(token_bytes(token))
            named[f"token_id:{token}" if text in named else text] = finite(logprob)
    return dict(sorted(named.items(), key=lambda entry: -entry[1]))


def _text(data: bytes) -> str:
    """What the bytes say, or, as OpenAI writes those that are no whole UTF-8, `bytes:\\xf0\\x9f`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def token_object(token: int, token_bytes: TokenBytes) -> dict[str, Any]:
    """`{"token", "bytes"}`: its text, and what it stands for."""
    data = token_bytes(token)
    return {"token": _text(data), "bytes": list(data)}


def finite(logprob: float) -> float:
    """A number that JSON can say."""
    return max(logprob, _LOWEST)
