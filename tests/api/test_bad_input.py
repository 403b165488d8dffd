"""Bad input: each gets a 4xx in the contract's shape that says what was expected and what came."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.engine.model import LoadedModel
from tests.api.parrot import CONTEXT_TOKENS, load_parrot
from tests.api.serving import CHAT, COMPLETIONS, Service, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

JSON = {"content-type": "application/json"}


def user(content: Any = "hello", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **fields}


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "hello", **fields}]}


# body, param, and a part of the message
WRONG_CHAT: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, "messages", "is required"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": None}, "messages", "is required"),
    ({"messages": "hello"}, "messages", "valid list, but is 'hello'"),
    ({"messages": [5]}, "messages[0]", "JSON object, but is 5"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "is required"),
    (message(role="wizard"), "messages[0].role", "'assistant', but is 'wizard'"),
    (message(role=5), "messages[0].role", "but is 5"),
    (message(name="x" * 129), "messages[0].name", "at most 128"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
    (user(None), "messages[0].content", "is required"),
    (user(5), "messages[0].content", "a string or a list of text parts, but is 5"),
    (user([{"type": "text"}]), "messages[0].content[0].text", "is required"),
    (user([{"type": "hologram"}]), "messages[0].content[0].type", "'hologram'"),
    (user([{"text": "x"}]), "messages[0].content[0].type", "is required"),
    ({"messages": [{"role": "user", "content": "x"}] * 4097}, "messages", "at most 4096 items"),
    (user(model=5), "model", "valid string, but is 5"),
    (user(model="x" * 301), "model", "at most 300"),
    (user(temperature=2.5), "temperature", "less than or equal to 2, but is 2.5"),
    (user(temperature=-0.1), "temperature", "greater than or equal to 0"),
    (user(temperature="1"), "temperature", "valid number, but is '1'"),
    (user(temperature=True), "temperature", "but is true"),
    (user(top_p=-0.1), "top_p", "greater than or equal to 0"),
    (user(top_p=1.1), "top_p", "less than or equal to 1"),
    (user(top_k=-2), "top_k", "greater than or equal to -1"),
    (user(top_k=1.5), "top_k", "integer"),
    (user(min_p=-0.5), "min_p", "greater than or equal to 0"),
    (user(min_p=1.5), "min_p", "less than or equal to 1"),
    (user(repetition_penalty=0), "repetition_penalty", "greater than or equal to 0.01"),
    (user(repetition_penalty=2.1), "repetition_penalty", "less than or equal to 2"),
    (user(presence_penalty=-2.1), "presence_penalty", "greater than or equal to -2"),
    (user(frequency_penalty=2.1), "frequency_penalty", "less than or equal to 2"),
    (user(seed=2**63), "seed", "less than"),
    (user(seed=1.5), "seed", "integer"),
    (user(seed=10**100), "seed", "too many digits"),
    (user(n=0), "n", "greater than or equal to 1"),
    (user(n=True), "n", "but is true"),
    (user(n=17), "n", "at most 16 here, but is 17"),
    (user(n=1000), "n", "less than or equal to 128"),
    (user(max_tokens=0), "max_tokens", "greater than or equal to 1"),
    (user(max_tokens=-2), "max_tokens", "or -1 for as many as there is room for, but is -2"),
    (user(max_tokens=True), "max_tokens", "integer, but is true"),
    (user(max_tokens=8.5), "max_tokens", "integer"),
    (user(n_predict=0), "n_predict", "greater than or equal to 1"),
    (user(max_new_tokens="5"), "max_new_tokens", "integer, but is '5'"),
    (user(max_tokens=5, n_predict=6), "n_predict", "equal 'max_tokens'"),
    (user(max_tokens=-1, max_new_tokens=6), "max_new_tokens", "equal 'max_tokens'"),
    (user(max_tokens=10**9), "max_tokens", "less than or equal to"),
    (user(max_completion_tokens="5"), "max_completion_tokens", "integer, but is '5'"),
    (user(max_tokens=5, max_completion_tokens=6), "max_tokens", "equal"),
    (user(stream="yes"), "stream", "boolean, but is 'yes'"),
    (user(stream_options={"include_usage": True}), "stream_options", "together with 'stream'"),
    (user(stream=True, stream_options=[]), "stream_options", "JSON object"),
    (user(stream=True, stream_options={"include_usage": 1}), "stream_options.include_usage", "boolean"),
    (user(stop=5), "stop", "a string or a list of strings, but is 5"),
    (user(stop=["a"] * 257), "stop", "at most 256 items"),
    (user(stop=["a" * 256] * 65), "stop", "at most 16384 characters in all, but has 16640"),
    (user(stop=["a" * 257]), "stop[0]", "at most 256 characters"),
    (user(stop=[1]), "stop[0]", "valid string, but is 1"),
    (user(logit_bias=[[1, 2]]), "logit_bias", "valid dictionary"),
    (user(logit_bias={"x": 1}), "logit_bias.x", "token ids"),
    (user(logit_bias={"-1": 1}), "logit_bias.-1", "token ids"),
    (user(logit_bias={"99999": 1}), "logit_bias", "below"),
    (user(logit_bias={"1": 101}), "logit_bias.1", "less than or equal to 100"),
    (user(logit_bias={"1": "1"}), "logit_bias.1", "valid number"),
    (user(logit_bias={str(i): 1 for i in range(1025)}), "logit_bias", "at most 1024"),
    (user(logprobs=1), "logprobs", "boolean, but is 1"),
    (user(top_logprobs=2), "top_logprobs", "together with 'logprobs'"),
    (user(logprobs=True, top_logprobs=21), "top_logprobs", "less than or equal to 20"),
    (user(adapters=5), "adapters", "valid list"),
    (user(adapters={"id": "a"}), "adapters", "valid list"),
    (user(adapters=["a"]), "adapters[0]", "JSON object, but is 'a'"),
    (user(adapters=[{"id": "a"}], lora_path="a"), "lora_path", "together with 'adapters'"),
    (user(adapter_id="a", lora_path="a"), "lora_path", "together with 'adapter_id'"),
    (user(lora_path=["a"]), "lora_path", "valid string, but is a list of 1"),
    (user(adapter_id=3), "adapter_id", "valid string, but is 3"),
    (user(chat_template_kwargs={"enable_thinking": 1}), "chat_template_kwargs.enable_thinking", "boolean"),
    (message(reasoning="a", reasoning_content="b"), "messages[0].reasoning", "equal 'reasoning_content'"),
    (
        user(continue_final_message=True, add_generation_prompt=True),
        "continue_final_message",
        "together with 'add_generation_prompt'",
    ),
    (user(adapters=[{}]), "adapters[0].id", "is required"),
    (user(adapters=[{"id": "a", "weight": "1"}]), "adapters[0].weight", "valid number"),
    (user(adapters=[{"id": "a", "weight": 1000}]), "adapters[0].weight", "less than or equal to 100"),
    (user(adapters=[{"id": "a"}, {"id": "a"}]), "adapters", "each adapter once"),
    (user(adapters=[{"id": str(i)} for i in range(17)]), "adapters", "at most 16"),
]

WRONG_COMPLETIONS: list[tuple[Any, str]] = [
    (None, "is required"),
    ("", "at least 1 character"),
    ([], "at least 1 item"),
    ([""], "at least 1 character"),
    ([[]], "at least 1 item"),
    (5, "but is 5"),
    ({"a": 1}, "but is an object"),
    ([1, "a"], "integer, but is 'a'"),
    (["a", 1], "string, but is 1"),
    ([True], "integer, but is true"),
    ([-1], "greater than or equal to 0"),
    ([100_000], "token ids below"),
    ([[1], ["a"]], "integer, but is 'a'"),
    ([1.5], "integer"),
    (["a"] * 257, "at most 256 items"),
]

UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    *(
        (CHAT, user(**{name: value}), name)
        for name, value in {
            "tools": [{"type": "function"}],
            "tool_choice": "required",
            "functions": [{}],
            "function_call": {"name": "x"},
            "response_format": {"type": "json_object"},
            "audio": {"voice": "x"},
            "modalities": ["text", "audio"],
            "prediction": {"type": "content"},
            "web_search_options": {},
            "reasoning_effort": "high",
            "store": True,
            "service_tier": "priority",
            "chat_template": "{{ 1 }}",
            "guided_json": {},
            "guided_regex": "a",
            "structured_outputs": {"json": {}},
            "echo": True,
            "ignore_eos": True,
            "stop_token_ids": [1],
        }.items()
    ),
    (CHAT, message(role="tool", tool_call_id="1"), "messages[0].tool_call_id"),
    (CHAT, message(role="tool"), "messages[0].role"),
    (CHAT, message(role="function"), "messages[0].role"),
    (CHAT, message(role="assistant", tool_calls=[{}]), "messages[0].tool_calls"),
    (CHAT, user([{"type": "image_url", "image_url": {"url": "x"}}]), "messages[0].content[0].type"),
    (CHAT, user([{"type": "input_audio"}]), "messages[0].content[0].type"),
    (COMPLETIONS, {"prompt": "hello", "echo": True}, "echo"),
    (COMPLETIONS, {"prompt": "hello", "suffix": "x"}, "suffix"),
    (COMPLETIONS, {"prompt": "hello", "best_of": 3}, "best_of"),
    (COMPLETIONS, {"prompt": "hello", "n": 2, "best_of": 3}, "best_of"),
]

HARMLESS = {
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "store": False,
    "service_tier": "auto",
    "parallel_tool_calls": False,
    "user": "someone",
    "metadata": {"a": "b"},
    "made_up": [1, {"x": 2}],
    "temperature": None,
    "stop": None,
    "adapters": [],
    "logit_bias": {},
}

NOT_JSON: list[tuple[bytes, dict[str, str], str]] = [
    (b"", JSON, "body is required"),
    (b"{", JSON, "not valid JSON"),
    (b"[]", JSON, "JSON object, but is a list of 0"),
    (b'"hello"', JSON, "JSON object, but is 'hello'"),
    (b'{"messages": NaN}', JSON, "not valid JSON"),
    (b'{"temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}', JSON, "finite"),
    (b'{"a": "\xff"}', JSON, "not valid JSON"),
    (b'{"a": "\\ud800"}', JSON, "not valid JSON"),
    (b"[" * 5000 + b"]" * 5000, JSON, "not valid JSON"),
    (b'{"a":' * 5000 + b"1" + b"}" * 5000, JSON, "not valid JSON"),
    (b'{"n": ' + b"9" * 5000 + b"}", JSON, "not valid JSON"),
    (b"\x00\x01\x02", JSON, "not valid JSON"),
    (json.dumps(user()).encode(), {"content-type": "text/plain"}, "application/json"),
    (json.dumps(user()).encode(), {}, "application/json"),
]


async def refused(service: Service, path: str, status: int = 400, **request: Any) -> dict[str, Any]:
    reply = await service.client.post(path, **request)
    assert reply.status_code == status, reply.text
    assert reply.headers["x-request-id"]
    body = reply.json()
    assert list(body) == ["error"]
    error = body["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert error["type"] == "invalid_request_error"
    assert 0 < len(error["message"]) < 1000
    return error


@pytest.mark.parametrize(("body", "param", "part"), WRONG_CHAT)
async def test_wrong_chat(service: Service, body: dict[str, Any], param: str | None, part: str) -> None:
    error = await refused(service, CHAT, json=body)
    assert error["param"] == param
    assert part in error["message"]
    assert error["code"] is None
    assert (await service.chat("hello"))["choices"][0]["message"]["content"] == "Hi there!"


@pytest.mark.parametrize(("prompt", "part"), WRONG_COMPLETIONS)
async def test_wrong_prompts(service: Service, prompt: Any, part: str) -> None:
    error = await refused(service, COMPLETIONS, json={"prompt": prompt})
    assert error["param"].startswith("prompt")
    assert part in error["message"]


@pytest.mark.parametrize("logprobs", [True, -1, 21, "1"])
async def test_wrong_logprobs_of_completions(service: Service, logprobs: Any) -> None:
    error = await refused(service, COMPLETIONS, json={"prompt": "x", "logprobs": logprobs})
    assert error["param"] == "logprobs"


@pytest.mark.parametrize(("path", "body", "param"), UNSUPPORTED)
async def test_unsupported_parameters_are_named(
    service: Service, path: str, body: dict[str, Any], param: str
) -> None:
    error = await refused(service, path, json=body)
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == param
    assert "Not supported" in error["message"]


async def test_what_asks_for_nothing_is_accepted(service: Service) -> None:
    assert (await service.chat("hello", **HARMLESS))["choices"][0]["message"]["content"] == "Hi there!"


@pytest.mark.parametrize(("content", "headers", "part"), NOT_JSON, ids=range(len(NOT_JSON)))
async def test_not_json(service: Service, content: bytes, headers: dict[str, str], part: str) -> None:
    error = await refused(service, CHAT, content=content, headers=headers)
    assert part in error["message"]
    assert error["code"] is None


async def test_several_problems_are_told_at_once(service: Service) -> None:
    body = user(n=0, temperature=9, top_p=-1, min_p=9, top_k=-5)
    error = await refused(service, CHAT, json=body)
    assert "And 2 more problems" in error["message"]


async def test_many_wrong_items_are_one_short_problem(service: Service) -> None:
    error = await refused(service, COMPLETIONS, json={"prompt": [1] + ["x"] * 100_000})
    assert error["param"] == "prompt[1]"
    assert len(error["message"]) < 200


async def test_huge_input_is_not_repeated(service: Service) -> None:
    error = await refused(service, CHAT, json=user(**{"temperature": "x" * 100_000}))
    assert len(error["message"]) < 200
    error = await refused(service, CHAT, json=user(logit_bias={"k" * 100_000: 1}))
    assert len(error["message"]) + len(error["param"]) < 400


async def test_a_prompt_longer_than_the_context(service: Service) -> None:
    tokens = CONTEXT_TOKENS + 9
    for path, body, param in [
        (CHAT, user("x" * tokens), "messages"),
        (COMPLETIONS, {"prompt": "x" * tokens}, "prompt"),
        (COMPLETIONS, {"prompt": [1] * tokens}, "prompt"),
        (COMPLETIONS, {"prompt": [1] * CONTEXT_TOKENS}, "prompt"),
    ]:
        error = await refused(service, path, json=body)
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == param
        assert f"maximum context length is {CONTEXT_TOKENS} tokens" in error["message"]
        assert str(tokens) in error["message"] or body.get("prompt") == [1] * CONTEXT_TOKENS


async def test_a_prompt_far_too_long_is_refused_before_it_is_read(service: Service) -> None:
    error = await refused(service, CHAT, json=user("x" * 1_000_000))
    assert error["code"] == "context_length_exceeded"
    assert "at least" in error["message"]


async def test_prompt_and_completion_longer_than_the_context(service: Service) -> None:
    fits = await service.chat("hello", max_tokens=CONTEXT_TOKENS - 1)
    assert fits["choices"][0]["finish_reason"] == "stop"
    for name in ("max_tokens", "max_completion_tokens"):
        error = await refused(service, CHAT, json=user(**{name: CONTEXT_TOKENS}))
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == name
        assert str(CONTEXT_TOKENS + 1) in error["message"]


async def test_what_the_chat_template_refuses(service: Service) -> None:
    messages = [*user()["messages"], {"role": "system", "content": "late"}]
    error = await refused(service, CHAT, json={"messages": messages})
    assert error["code"] == "chat_template_error"
    assert error["param"] == "messages"
    assert "A system message must come first." in error["message"]


async def test_a_model_without_a_chat_template(service: Service) -> None:
    async with serving(load_parrot(template=None)) as service:
        error = await refused(service, CHAT, json=user())
        assert error["code"] == "no_chat_template"
        assert "/v1/completions" in error["message"]
        assert (await service.complete("hello"))["choices"][0]["text"] == "Hi there!"


async def test_a_body_that_is_too_large(parrot: LoadedModel) -> None:
    async def chunks():
        for _ in range(3):
            yield b" " * 1000

    async with serving(parrot, max_body_bytes=2048) as service:
        error = await refused(service, CHAT, 413, json=user("x" * 3000))
        assert error["code"] == "body_too_large"
        assert "2048" in error["message"]
        error = await refused(service, CHAT, 413, content=chunks(), headers=JSON)
        assert error["code"] == "body_too_large"
        assert (await service.chat("hello"))["usage"]["total_tokens"] == 5


async def test_unknown_urls_and_methods(service: Service) -> None:
    error = await refused(service, "/v1/nothing", 404)
    assert "POST '/v1/nothing'" in error["message"]
    reply = await service.client.get(CHAT)
    assert reply.status_code == 405
    assert reply.headers["allow"] == "POST"
    assert reply.json()["error"]["code"] == "method_not_allowed"
