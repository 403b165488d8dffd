"""LiteLLM: answers of base and adapters by the providers that people choose for a server of their own."""

from __future__ import annotations

from typing import Any

import litellm
import pytest

from tests.clients.conftest import LONG, QUESTION

litellm.suppress_debug_info = True
PROVIDERS = ["openai", "hosted_vllm", "lm_studio", "litellm_proxy"]


def complete(url: str, provider: str, text: str = QUESTION, **fields: Any) -> Any:
    given = {"temperature": 0, "max_tokens": 16, "num_retries": 0, "max_retries": 0, **fields}
    messages = [{"role": "user", "content": text}]
    return litellm.completion(f"{provider}/pirate", messages, api_base=url, api_key="none", **given)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_answers(url: str, provider: str, pirate_answer: str) -> None:
    assert complete(url, provider).choices[0].message.content == pirate_answer
    chunks = list(complete(url, provider, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == pirate_answer
    assert chunks[-1].usage.completion_tokens > 0


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_known(url: str, provider: str, stream: bool) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        complete(url, provider, LONG, stream=stream)
    with pytest.raises(litellm.ContextWindowExceededError):
        complete(url, provider, max_tokens=8192, stream=stream)


def test_a_completion_that_is_too_long_is_known(url: str) -> None:
    given: dict[str, Any] = {"api_base": url, "api_key": "none", "max_tokens": 4, "max_retries": 0}
    assert litellm.text_completion("Ahoy", "text-completion-openai/pirate", **given).choices[0].text
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.text_completion(LONG, "text-completion-openai/pirate", **given)


def test_a_model_that_is_not_there_is_known(url: str) -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(
            "openai/nobody",
            [{"role": "user", "content": "Hi"}],
            api_base=url,
            api_key="none",
            max_retries=0,
        )
