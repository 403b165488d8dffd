"""OpenAI's client: every model that is listed answers, by the very name; scores, and errors."""

from __future__ import annotations

import openai
import pytest

from tests.clients.conftest import CONTEXT_TOKENS, LONG, QUESTION
from tests.e2e.running import Served


def test_every_model_that_is_listed_answers_by_its_name(server: Served) -> None:
    with server.openai() as client:
        models = client.models.list().data
        assert {"pirate", "shakespeare"} <= {model.id for model in models}
        for model in models:
            assert client.models.retrieve(model.id).model_dump()["max_model_len"] == CONTEXT_TOKENS
            answer = client.chat.completions.create(
                model=model.id, messages=[{"role": "user", "content": QUESTION}], max_tokens=2
            )
            assert answer.model == model.id


def test_scores_of_a_completion_belong_to_its_text(server: Served) -> None:
    with server.openai() as client:
        prompt = "Count: 1 2 3 4 5 6"
        for stop in (None, "8", " 1"):
            choice = client.completions.create(
                model="pirate", prompt=prompt, logprobs=2, max_tokens=24, temperature=0, stop=stop
            ).choices[0]
            scores = choice.logprobs
            assert scores is not None
            assert scores.tokens is not None
            assert scores.text_offset is not None
            assert "".join(scores.tokens).startswith(choice.text)
            for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
                assert token.startswith(choice.text[offset : offset + len(token)])


def test_a_prompt_that_is_too_long_has_a_code(server: Served) -> None:
    with server.openai() as client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="pirate", messages=[{"role": "user", "content": LONG}])
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("base", ["", "/v1/v1", "/v1/chat/completions"])
def test_a_base_url_that_is_slightly_wrong_is_told_the_right_one(server: Served, base: str) -> None:
    with (
        openai.OpenAI(base_url=f"{server.url}{base}", api_key="none", max_retries=0) as client,
        pytest.raises(openai.NotFoundError, match="Did you mean POST /v1/chat/completions"),
    ):
        client.chat.completions.create(model="pirate", messages=[{"role": "user", "content": QUESTION}])


def test_a_base_url_with_a_slash_at_its_end(server: Served) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1/", api_key="none", max_retries=0) as client:
        assert client.models.list().data
