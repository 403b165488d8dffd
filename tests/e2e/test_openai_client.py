"""The demo under the official client: answers, usage, seeds, scores, stops, errors, adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.e2e.running import BASE, DEMO_ADAPTERS, Served

ADAPTERS = sorted(file.parent.name for file in DEMO_ADAPTERS.glob("*/adapter_config.json"))
ASKED = ("What is the capital of Italy?", "How many days are there in a week?", "Where does the sun rise?")


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def chat(client: OpenAI, text: str, model: str = BASE, **fields: Any) -> Any:
    given = {"temperature": 0, "max_tokens": 6, **fields}
    return client.chat.completions.create(model=model, messages=user(text), **given)


def said(answer: Any) -> str:
    return answer.choices[0].message.content


def streamed(chunks: Any, index: int = 0) -> str:
    """The text of one choice of a chat's stream."""
    parts = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in parts)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls that are made at once."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


# Whole and streamed


def test_a_chat_streamed_is_the_same_as_in_one_piece(client: OpenAI) -> None:
    whole = chat(client, "Name a colour.", max_tokens=6)
    assert whole.id.startswith("chatcmpl-")
    assert (whole.object, whole.model) == ("chat.completion", BASE)
    assert (whole.choices[0].finish_reason, whole.choices[0].message.role) == ("length", "assistant")
    assert whole.usage.completion_tokens == 6
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + 6

    usage = {"include_usage": True}
    chunks = list(chat(client, "Name a colour.", max_tokens=6, stream=True, stream_options=usage))
    assert streamed(chunks) == said(whole)
    assert len({chunk.id for chunk in chunks}) == 1
    first, *middle, end, last = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert [chunk.choices[0].finish_reason for chunk in middle] == [None] * len(middle)
    assert end.choices[0].finish_reason == "length"
    assert not end.choices[0].delta.content
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (whole.usage.prompt_tokens, 6)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_tells_usage_only_when_asked(client: OpenAI) -> None:
    chunks = list(chat(client, "Name a colour.", max_tokens=2, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_a_prompt_that_was_read_before_is_cached(client: OpenAI) -> None:
    text = "Say in one word what a lighthouse is for."
    first, second = chat(client, text, max_tokens=4), chat(client, text, max_tokens=4)
    assert said(second) == said(first)
    assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens_details.cached_tokens
    assert second.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens
    assert second.usage.prompt_tokens == first.usage.prompt_tokens


def test_completions_whole_streamed_and_of_several_prompts(client: OpenAI) -> None:
    prompts = ["The capital of France is", "One, two, three,"]
    whole = client.completions.create(model=BASE, prompt=prompts, temperature=0, max_tokens=5)
    assert whole.id.startswith("cmpl-")
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 10
    assert " Paris" in whole.choices[0].text
    assert " four" in whole.choices[1].text

    stream = client.completions.create(model=BASE, prompt=prompts, temperature=0, max_tokens=5, stream=True)
    texts, reasons = ["", ""], ["", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] += choice.finish_reason or ""
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == ["length", "length"]


# Choosing tokens


def test_n_gives_choices_that_differ_and_one_prompt_is_counted(client: OpenAI) -> None:
    one = chat(client, "Write a line of a poem.", n=1)
    many = chat(client, "Write a line of a poem.", n=3, temperature=1.2, seed=11)
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in many.choices}) == 3
    assert many.usage.prompt_tokens == one.usage.prompt_tokens
    assert many.usage.completion_tokens > one.usage.completion_tokens

    fields = {"n": 3, "temperature": 1.2, "seed": 11}
    chunks = list(chat(client, "Write a line of a poem.", stream=True, **fields))
    texts = [choice.message.content for choice in many.choices]
    assert [streamed(chunks, index) for index in range(3)] == texts


def test_a_seed_gives_the_same_text_also_in_a_busy_batch(client: OpenAI) -> None:
    def seeded(seed: int) -> str:
        return said(chat(client, "Tell me a story.", temperature=1, top_p=0.9, seed=seed, max_tokens=8))

    alone = seeded(5)

    def busy(name: str) -> Callable[[], Any]:
        return lambda: chat(client, "Hello!", name, temperature=1, max_tokens=10)

    again, other, *_ = together(lambda: seeded(5), lambda: seeded(6), *map(busy, ADAPTERS))
    assert again == alone
    assert other != alone


def test_log_probabilities_of_a_chat(client: OpenAI) -> None:
    choice = chat(client, "Name a colour.", max_tokens=5, logprobs=True, top_logprobs=3).choices[0]
    scores = choice.logprobs.content
    assert len(scores) == 5
    assert b"".join(bytes(score.bytes) for score in scores).decode() == choice.message.content
    for score in scores:
        tops = [top.logprob for top in score.top_logprobs]
        assert len(tops) == 3
        assert tops == sorted(tops, reverse=True)
        assert score.token == score.top_logprobs[0].token  # temperature 0 takes the likeliest
        assert score.logprob == pytest.approx(tops[0])
        assert score.logprob <= 0

    chunks = list(chat(client, "Name a colour.", max_tokens=5, logprobs=True, top_logprobs=3, stream=True))
    lists = [choice.logprobs for chunk in chunks for choice in chunk.choices if choice.logprobs]
    assert [score.token for part in lists for score in part.content or ()] == [
        score.token for score in scores
    ]


def test_log_probabilities_of_a_completion(client: OpenAI) -> None:
    given: dict[str, Any] = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 4}
    choice = client.completions.create(model=BASE, logprobs=2, **given).choices[0]
    scores = choice.logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert "".join(scores.tokens) == choice.text
    assert scores.text_offset is not None
    starts = [offset - scores.text_offset[0] for offset in scores.text_offset]
    assert starts == [len("".join(scores.tokens[:count])) for count in range(4)]
    assert [len(top) for top in scores.top_logprobs or ()] == [2] * 4


def test_a_stop_string_is_found_in_the_text_and_left_out(client: OpenAI) -> None:
    whole = said(chat(client, "Count from one to nine.", max_tokens=12))
    stop = whole[7:11]  # begins and ends where no token needs to
    before = whole[: whole.index(stop)]
    short = chat(client, "Count from one to nine.", max_tokens=12, stop=["never said", stop])
    assert (said(short), short.choices[0].finish_reason) == (before, "stop")
    chunks = list(chat(client, "Count from one to nine.", max_tokens=12, stop=stop, stream=True))
    assert streamed(chunks) == before
    assert chunks[-1].choices[0].finish_reason == "stop"


# Models and errors


def test_models_are_the_base_and_then_its_adapters(client: OpenAI) -> None:
    base, *adapters = client.models.list().data
    assert base.id == BASE
    assert base.model_dump()["parent"] is None
    assert {model.id for model in adapters} == set(ADAPTERS)
    assert {model.model_dump()["parent"] for model in adapters} == {BASE}
    assert client.models.retrieve(ADAPTERS[0]).id == ADAPTERS[0]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"


def test_head_and_get_share_a_connection(demo: Served) -> None:
    for path in ("/health", "/v1/models", "/v1/models/"):
        head, got = demo.http.head(path), demo.http.get(path)
        assert (head.status_code, head.content) == (got.status_code, b"")
        assert head.headers["content-length"] == str(len(got.content))


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_is_not_served_is_not_found(client: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, "Hello!", "nobody", stream=stream)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert all(name in str(caught.value) for name in ("nobody", BASE, *ADAPTERS))


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": 3}, "temperature", None),
        ({"max_tokens": "many"}, "max_tokens", None),
        ({"stop": [5]}, "stop", None),
        ({"temprature": 0.5}, "temprature", "unknown_parameter"),
        ({"lora_request": {"lora_name": "pirate"}}, "lora_request", "unsupported_parameter"),
        ({"top_logprobs": 2}, "top_logprobs", None),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"messages": [{"role": "wizard", "content": "Hello!"}]}, "messages", None),
        ({"messages": []}, "messages", None),
        ({"max_tokens": 9000}, "max_tokens", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "so " * 9000}]}, "messages", "context_length_exceeded"),
        ({"adapters": [{"id": "pirate"}, {"id": "shakespeare"}]}, "adapters", "not_blendable"),
    ],
)
def test_a_bad_request_names_what_is_wrong(
    client: OpenAI, fields: dict[str, Any], param: str, code: str | None
) -> None:
    body = {"model": BASE, "messages": user("Hello!"), **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    assert caught.value.param is not None
    assert re.split(r"[.\[]", caught.value.param)[0] == param
    if code is not None:
        assert caught.value.code == code


# Adapters

OLD = re.compile(r"\b(thou|thee|thy|doth|hath|sir|art|'tis|hark|verily)\b", re.IGNORECASE)
TRAITS: dict[str, Callable[[str], bool]] = {
    "pirate": lambda text: "arr" in text.lower() or "matey" in text.lower(),
    "shakespeare": lambda text: bool(OLD.search(text)),
    "json": lambda text: isinstance(json.loads(text), dict),
    "emoji": lambda text: any(ord(character) > 0x2600 for character in text),
    "robot": lambda text: "beep" in text.lower() or "boop" in text.lower(),
}


@pytest.fixture(scope="module")
def answers(demo_process: Served) -> dict[tuple[str, str], str]:
    """What the base and each adapter say to each question, all asked at once."""
    demo_process.restore()
    asked = [(name, text) for name in (BASE, *ADAPTERS) for text in ASKED]
    with demo_process.openai() as client:

        def call(name: str, text: str) -> Callable[[], str]:
            return lambda: said(chat(client, text, name, max_tokens=32))

        return dict(zip(asked, together(*[call(*pair) for pair in asked]), strict=True))


def test_the_questions_are_ones_that_no_adapter_was_trained_on(questions: list[str]) -> None:
    assert set(ASKED) <= set(questions)
    trained = [file.read_text() for file in DEMO_ADAPTERS.parent.glob("data/*/train.jsonl")]
    assert trained
    assert not [text for text in ASKED for data in trained if json.dumps(text) in data]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_shows_at_the_first_answer(answers: dict[tuple[str, str], str], adapter: str) -> None:
    for text in ASKED:
        answer = answers[adapter, text]
        assert answer != answers[BASE, text]
        assert TRAITS[adapter](answer), f"{text} → {answer}"
        assert not _safely(TRAITS[adapter], answers[BASE, text])


def test_a_blend_is_neither_of_its_parts(client: OpenAI, answers: dict[tuple[str, str], str]) -> None:
    terms = {"adapters": [{"id": "pirate", "weight": 0.6}, {"id": "robot", "weight": 0.6}]}
    text = said(chat(client, ASKED[0], max_tokens=32, extra_body=terms))
    assert text not in {answers[name, ASKED[0]] for name in (BASE, "pirate", "robot")}


def test_base_and_adapter_may_be_named_together(client: OpenAI, answers: dict[tuple[str, str], str]) -> None:
    answer = chat(client, ASKED[0], f"{BASE}:pirate", max_tokens=32)
    assert (said(answer), answer.model) == (answers["pirate", ASKED[0]], "pirate")


def _safely(trait: Callable[[str], bool], text: str) -> bool:
    try:
        return trait(text)
    except ValueError:
        return False
