"""Completions: prompts of every kind, and what differs from chat."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.serving import COMPLETIONS, Service

pytestmark = pytest.mark.asyncio(loop_scope="module")


def ids(service: Service, *words: str) -> list[int]:
    return [token for word in words for token in service.engine.info.tokenizer.encode(word)]


async def test_whole_answer(service: Service) -> None:
    answer = await service.complete("country")
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    # The space between prompt and completion belongs to the completion.
    assert answer["choices"] == [{"index": 0, "text": " Paris.", "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"]["prompt_tokens"] == 1
    assert answer["usage"]["completion_tokens"] == 3


async def test_stream(service: Service) -> None:
    *chunks, usage, done = await service.events(
        COMPLETIONS, prompt="country", stream_options={"include_usage": True}
    )
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in chunks)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " Paris."
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "stop"]


async def test_every_kind_of_prompt(service: Service) -> None:
    hello, country = ids(service, "hello"), ids(service, "country")
    kinds: list[tuple[Any, list[str]]] = [
        ("hello", ["Hi there!"]),
        (["hello", "country"], ["Hi there!", " Paris."]),
        (hello, ["Hi there!"]),
        ([hello, country], ["Hi there!", " Paris."]),
    ]
    for prompt, texts in kinds:
        answer = await service.complete(prompt)
        assert [choice["text"] for choice in answer["choices"]] == texts
        assert answer["usage"]["prompt_tokens"] == len(texts)


async def test_prompts_times_choices_are_numbered_through(service: Service) -> None:
    answer = await service.complete(["hello", "country"], n=2)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "Hi there!"),
        (1, "Hi there!"),
        (2, " Paris."),
        (3, " Paris."),
    ]
    *chunks, _ = await service.events(COMPLETIONS, prompt=["hello", "country"], n=2)
    for index, text in enumerate(["Hi there!", "Hi there!", " Paris.", " Paris."]):
        mine = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in mine) == text


async def test_logprobs_have_offsets_into_the_text(service: Service) -> None:
    logprobs = (await service.complete("greek", logprobs=1, stop="gamma"))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["alp", "ha", "be", "ta"]
    assert logprobs["text_offset"] == [0, 3, 5, 7]
    assert [list(top) for top in logprobs["top_logprobs"]] == [["alp"], ["ha"], ["be"], ["ta"]]
    assert all(-0.01 < value <= 0 for value in logprobs["token_logprobs"])


async def test_logprobs_of_the_chosen_tokens_alone(service: Service) -> None:
    logprobs = (await service.complete("hello", logprobs=0))["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["Hi", " there", "!"]
    assert [list(top) for top in logprobs["top_logprobs"]] == [["Hi"], [" there"], ["!"]]


@pytest.mark.parametrize(
    ("stop", "text", "tokens", "offsets"),
    [
        ("2", "% ", ["%", " "], [0, 1]),
        (None, "% 23", ["%", " ", "2", "3"], [0, 1, 2, 3]),
        ("3", "% 2", ["%", " ", "2"], [0, 1, 2]),
        ("% ", "", [], []),
    ],
)
async def test_a_lone_space_is_a_token_with_a_place(
    service: Service, stop: str | None, text: str, tokens: list[str], offsets: list[int]
) -> None:
    (choice,) = (await service.complete("#", logprobs=1, stop=stop))["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")
    assert choice["logprobs"]["tokens"] == tokens
    assert choice["logprobs"]["text_offset"] == offsets
    assert all(token in top for token, top in zip(tokens, choice["logprobs"]["top_logprobs"], strict=True))


async def test_an_unlikely_token_is_among_its_alternatives(service: Service) -> None:
    (rare,) = ids(service, "q")
    (choice,) = (
        await service.complete("hello", logprobs=1, max_tokens=1, temperature=0, logit_bias={rare: 100})
    )["choices"]
    (top,) = choice["logprobs"]["top_logprobs"]
    assert choice["text"] == "q"
    assert top[choice["text"]] == choice["logprobs"]["token_logprobs"][0]


@pytest.mark.parametrize("stop", [None, "3", "gam", "é"])
async def test_streamed_logprobs_are_those_of_the_whole_answers(service: Service, stop: str | None) -> None:
    asked = {"prompt": ["#", "greek", "accent"], "n": 2, "logprobs": 2, "stop": stop, "max_tokens": 6}
    whole = (await service.complete(asked.pop("prompt"), **asked))["choices"]
    chunks = await service.events(COMPLETIONS, prompt=["#", "greek", "accent"], **asked)
    for choice in whole:
        pieces = [
            piece for chunk in chunks[:-1] for piece in chunk["choices"] if piece["index"] == choice["index"]
        ]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        told = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
        for name in ("tokens", "text_offset"):
            assert [one for part in told for one in part[name]] == choice["logprobs"][name]
        for part in told:
            assert len(set(map(len, part.values()))) == 1


async def test_greedy_and_sampled_with_a_seed_repeat_themselves(service: Service) -> None:
    wild = {"temperature": 2.0, "logit_bias": {}, "max_tokens": 12, "stop": None}
    flat = {str(token): 30.0 for token in ids(service, "abcdefgh")}
    one, two, other = [
        (await service.complete("sing", **{**wild, "logit_bias": flat, "seed": seed}))["choices"][0]["text"]
        for seed in (7, 7, 8)
    ]
    assert one == two
    assert one != other


@pytest.mark.parametrize(
    "fields", [{"best_of": 1}, {"best_of": 2, "n": 2}, {"echo": False}, {"suffix": None}]
)
async def test_values_that_ask_for_nothing_are_accepted(service: Service, fields: dict[str, Any]) -> None:
    assert (await service.complete("hello", **fields))["choices"][0]["text"] == "Hi there!"
