"""LangChain's classes for OpenAI: answers, streams, scores, and prompts that are too long."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.exceptions import ContextOverflowError, ModelNotFoundError
from langchain_openai import ChatOpenAI

from tests.clients.conftest import LONG, QUESTION


def chat(url: str, **fields: Any) -> ChatOpenAI:
    given = {"model": "pirate", "temperature": 0, "max_tokens": 16, "max_retries": 0, **fields}
    return ChatOpenAI(base_url=url, api_key="none", **given)


def test_answers_and_their_use_of_tokens(url: str, pirate_answer: str) -> None:
    answer = chat(url).invoke(QUESTION)
    assert answer.content == pirate_answer
    assert answer.usage_metadata is not None
    chunks = list(chat(url, stream_usage=True).stream(QUESTION))
    assert "".join(str(chunk.content) for chunk in chunks) == pirate_answer
    used = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert used[-1]["total_tokens"] == answer.usage_metadata["total_tokens"]


def test_scores(url: str) -> None:
    answer = chat(url, logprobs=True, top_logprobs=2).invoke(QUESTION)
    scores = answer.response_metadata["logprobs"]["content"]
    assert b"".join(bytes(score["bytes"]) for score in scores).decode() == answer.content
    assert all(len(score["top_logprobs"]) == 2 for score in scores)


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 8191}, {"model_kwargs": {"n": 2}}])
def test_a_prompt_that_is_too_long_is_known(url: str, fields: dict[str, Any]) -> None:
    text = QUESTION if "max_tokens" in fields else LONG
    with pytest.raises(ContextOverflowError):
        chat(url, **fields).invoke(text)
    with pytest.raises(ContextOverflowError):
        list(chat(url, **fields).stream(text))


def test_a_model_that_is_not_there_is_known(url: str) -> None:
    with pytest.raises(ModelNotFoundError):
        chat(url, model="nobody").invoke(QUESTION)
