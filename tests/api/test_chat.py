"""Chat: whole answers and streams, in OpenAI's form."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from server.engine.model import LoadedModel
from tests.api.parrot import TEMPLATE, TEXTS, load_parrot
from tests.api.serving import CHAT, Service, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO = [{"role": "user", "content": "hello"}]


async def test_whole_answer(service: Service) -> None:
    answer = await service.chat("hello")
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "parrot"
    assert answer["system_fingerprint"] == "fp_0123456789ab"
    assert isinstance(answer["created"], int)
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hi there!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 4,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_stream_opens_with_the_role_and_ends_with_a_reason_and_done(service: Service) -> None:
    *chunks, done = await service.events(CHAT, messages=HELLO)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(choice["delta"].get("content", "") for choice in choices) == "Hi there!"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    assert choices[-1]["delta"] == {}


async def test_stream_with_usage_has_null_in_all_chunks_and_one_more(service: Service) -> None:
    *chunks, last, done = await service.events(
        CHAT, messages=HELLO, stream_options={"include_usage": True, "include_obfuscation": False}
    )
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_a_second_look_at_a_prompt_is_cached(service: Service) -> None:
    first = await service.chat("x" * 50 + "hello")
    second = await service.chat("x" * 50 + "hello")
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert second["choices"] == first["choices"]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("abet", "alph"),
        ("ha", "alp"),
        (["zzz", "mm"], "alphabetaga"),
        (["betag", "tagam", "eta"], "alphab"),
        ("alphabetagamma", ""),
        ("a", ""),
        ("mma!", "alphabetagamma"),
    ],
)
async def test_a_stop_string_is_found_across_tokens(
    service: Service, stop: str | list[str], text: str
) -> None:
    answer = await service.chat("greek", stop=stop)
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["choices"][0]["finish_reason"] == "stop"
    *chunks, _ = await service.events(CHAT, messages=[{"role": "user", "content": "greek"}], stop=stop)
    streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert streamed == text
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_a_stop_string_ends_the_computing(service: Service) -> None:
    answer = await service.chat("sing", stop="lalala", max_tokens=500)
    assert answer["choices"][0]["message"]["content"] == ""
    assert answer["usage"]["completion_tokens"] == 3
    await service.idle()


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_a_limit_ends_the_answer(service: Service, name: str) -> None:
    answer = await service.chat("sing", **{name: 3})
    assert answer["choices"][0]["message"]["content"] == "lalala"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


async def test_without_a_limit_the_default_holds_or_what_room_there_is(parrot: LoadedModel) -> None:
    async with serving(parrot, default_max_tokens=7) as service:
        assert (await service.chat("sing"))["usage"]["completion_tokens"] == 7
    small = load_parrot(context_tokens=10)
    async with serving(small) as service:
        answer = await service.chat("xxxxsing")
        assert answer["usage"] == {
            "prompt_tokens": 5,
            "completion_tokens": 5,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 0},
        }


async def test_characters_of_several_tokens_come_whole(service: Service) -> None:
    *chunks, _ = await service.events(CHAT, messages=[{"role": "user", "content": "accent"}], max_tokens=5)
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert [piece for piece in pieces if piece] == ["é", "é", "\ufffd"]


async def test_an_empty_answer_is_an_answer(service: Service) -> None:
    answer = await service.chat("silence")
    assert answer["choices"][0]["message"]["content"] == ""
    assert answer["usage"]["completion_tokens"] == 1


async def test_several_choices(service: Service) -> None:
    answer = await service.chat("hello", n=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in answer["choices"]} == {TEXTS["hello"]}
    assert answer["usage"]["prompt_tokens"] == 1
    assert answer["usage"]["completion_tokens"] == 12


async def test_several_choices_streamed_end_each_by_itself(service: Service) -> None:
    *chunks, _ = await service.events(CHAT, messages=HELLO, n=2)
    for index in (0, 1):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "Hi there!"
        assert [choice["finish_reason"] for choice in mine].count("stop") == 1


async def test_logprobs_of_a_whole_answer(service: Service) -> None:
    answer = await service.chat("accent", logprobs=True, top_logprobs=2, max_tokens=2)
    first, second = answer["choices"][0]["logprobs"]["content"]
    assert (first["bytes"], second["bytes"]) == ([0xC3], [0xA9])
    assert (first["token"], second["token"]) == (r"bytes:\xc3", r"bytes:\xa9")
    assert -0.01 < first["logprob"] <= 0
    assert len(first["top_logprobs"]) == 2
    assert first["top_logprobs"][0] == {key: first[key] for key in ("token", "logprob", "bytes")}
    assert first["top_logprobs"][1]["logprob"] < -5


async def test_streamed_logprobs_are_those_of_the_whole_answer(service: Service) -> None:
    whole = (await service.chat("greek", logprobs=True, stop="abet"))["choices"][0]["logprobs"]["content"]
    *chunks, _ = await service.events(
        CHAT, messages=[{"role": "user", "content": "greek"}], logprobs=True, stop="abet"
    )
    logprobs = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    streamed = [entry for part in logprobs for entry in part["content"]]
    assert [entry["token"] for entry in streamed] == ["alp", "ha"]
    assert [entry["token"] for entry in whole] == ["alp", "ha"]


async def test_a_bias_changes_the_answer(service: Service) -> None:
    vocabulary = service.engine.info.tokenizer.get_vocab()
    bias = {str(vocabulary["Hi"]): -100, str(vocabulary["alp"]): 50}
    answer = await service.chat("hello", logit_bias=bias, max_tokens=1, logprobs=True, top_logprobs=20)
    assert answer["choices"][0]["message"]["content"] == "alp"


async def test_parts_of_a_content_are_joined_and_developers_are_system(service: Service) -> None:
    content = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": content, "name": "Bo"},
    ]
    reply = await service.client.post(CHAT, json={"messages": messages})
    assert reply.json()["choices"][0]["message"]["content"] == "Hi there!"


async def test_many_at_once_get_each_their_own(service: Service) -> None:
    words = ["hello", "greek"] * 12
    answers = await asyncio.gather(*(service.chat(word) for word in words))
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == [
        TEXTS[word] for word in words
    ]
    assert len({answer["id"] for answer in answers}) == len(words)


@pytest.mark.parametrize("model", [None, "", "default", "parrot"])
async def test_names_of_the_base(service: Service, model: str | None) -> None:
    assert (await service.chat("hello", model=model))["model"] == "parrot"


async def test_an_unknown_name_is_404_with_what_is_served(service: Service) -> None:
    reply = await service.client.post(CHAT, json={"messages": HELLO, "model": "gpt-9"})
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"
    assert "parrot" in reply.json()["error"]["message"]


# What a conversation may look like

ONE_SYSTEM_MESSAGE = (
    "{% for message in messages %}{% if loop.first or message.role != 'system' %}{{ message.content }}"
    "{% endif %}{% endfor %}"
)


def conversation(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


async def prompt_tokens(service: Service, messages: list[dict[str, Any]], **fields: Any) -> int:
    reply = await service.client.post(CHAT, json={"messages": messages, "max_tokens": 1, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()["usage"]["prompt_tokens"]


async def test_an_assistant_may_have_said_nothing(service: Service) -> None:
    for said in ({"content": None}, {}, {"content": ""}, {"content": []}):
        messages = [{"role": "assistant", **said}, *HELLO]
        assert await prompt_tokens(service, messages) == 1


@pytest.mark.parametrize("template", [TEMPLATE, ONE_SYSTEM_MESSAGE], ids=["refuses", "leaves out"])
async def test_first_system_messages_are_joined_where_the_template_takes_one(template: str) -> None:
    async with serving(load_parrot(template)) as service:
        joined = conversation(("system", "Be brief.\n\nBe kind."), ("user", "hello"))
        apart = conversation(("system", "Be brief."), ("developer", "Be kind."), ("user", "hello"))
        assert await prompt_tokens(service, apart) == await prompt_tokens(service, joined)
        late = conversation(("system", "Be brief."), ("user", "hello"), ("system", "Be kind."))
        reply = await service.client.post(CHAT, json={"messages": late})
        assert reply.status_code == 400
        assert reply.json()["error"]["code"] == "chat_template_error"


async def test_system_messages_stay_apart_where_the_template_takes_several() -> None:
    async with serving(
        load_parrot("{% for message in messages %}[{{ message.content }}]{% endfor %}")
    ) as service:
        messages = conversation(("system", "a"), ("system", "b"), ("user", "hello"))
        assert await prompt_tokens(service, messages) == len("[a][b][") + 1 + len("]")


ENDS = (
    "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}> {% endif %}"
)


async def test_the_last_message_goes_on() -> None:
    async with serving(load_parrot(ENDS)) as service:
        messages = conversation(("user", "x"), ("assistant", "greek"))
        assert await prompt_tokens(service, messages) == len("x\n_\n> ")
        assert await prompt_tokens(service, messages, add_generation_prompt=False) == len("x\n_\n")
        assert await prompt_tokens(service, messages, continue_final_message=True) == len("x\n_")
        for fields in ({}, {"add_generation_prompt": False}):
            body = {"messages": messages, "continue_final_message": True, **fields}
            reply = await service.client.post(CHAT, json=body)
            assert reply.json()["choices"][0]["message"]["content"] == TEXTS["greek"]
        streamed = await service.events(CHAT, messages=messages, continue_final_message=True)
        deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in streamed[:-1]]
        assert "".join(deltas) == TEXTS["greek"]


async def test_the_space_after_a_message_that_goes_on_is_kept(service: Service) -> None:
    messages = conversation(("user", "x"), ("assistant", "country"))
    for continues, text in ((True, " Paris."), (False, "Paris.")):
        reply = await service.client.post(
            CHAT, json={"messages": messages, "continue_final_message": continues}
        )
        assert reply.json()["choices"][0]["message"]["content"] == text


async def test_a_message_that_the_template_does_not_show_cannot_go_on() -> None:
    async with serving(load_parrot("{{ messages[0].content }}")) as service:
        messages = conversation(("user", "hello"), ("assistant", "Hi"))
        reply = await service.client.post(CHAT, json={"messages": messages, "continue_final_message": True})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "continue_final_message"
