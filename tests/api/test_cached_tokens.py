"""`usage` says how much of a prompt was not computed again: answers, streams, choices, several prompts."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.serving import CHAT, COMPLETIONS, Service

pytestmark = pytest.mark.asyncio(loop_scope="module")


def cached(usage: dict[str, Any]) -> int:
    return usage["prompt_tokens_details"]["cached_tokens"]


async def streamed(service: Service, path: str, **fields: Any) -> dict[str, Any]:
    *_, last, _ = await service.events(path, **fields, stream_options={"include_usage": True})
    return last["usage"]


async def test_chat_streamed_and_of_several_choices(service: Service) -> None:
    messages = [{"role": "user", "content": "s" * 40 + "hello"}]
    first = await streamed(service, CHAT, messages=messages)
    assert cached(first) == 0
    whole = first["prompt_tokens"] - 1  # the last token is always computed
    assert cached(await streamed(service, CHAT, messages=messages)) == whole
    assert cached(await streamed(service, CHAT, messages=messages, n=3)) == whole
    answer = await service.chat("s" * 40 + "hello", n=3)
    assert cached(answer["usage"]) == whole


async def test_completions_streamed_and_of_several_prompts(service: Service) -> None:
    one, two = [5] * 30 + [6], [7] * 20 + [8]
    assert cached(await streamed(service, COMPLETIONS, prompt=one, max_tokens=2)) == 0
    assert cached(await streamed(service, COMPLETIONS, prompt=one, max_tokens=2)) == 30
    assert cached((await service.complete([one, two], max_tokens=2))["usage"]) == 30
    assert cached((await service.complete([one, two], max_tokens=2, n=2))["usage"]) == 30 + 20


async def test_cache_salts_keep_prompts_apart(service: Service) -> None:
    prompt = [9] * 40 + [3]
    own = [await streamed(service, COMPLETIONS, prompt=prompt, max_tokens=2, cache_salt="a") for _ in "12"]
    assert [cached(usage) for usage in own] == [0, 40]
    for other in ({}, {"cache_salt": "b"}):
        assert cached(await streamed(service, COMPLETIONS, prompt=prompt, max_tokens=2, **other)) == 0


async def test_cache_salts_keep_compared_prompts_apart(service: Service) -> None:
    messages = [{"role": "user", "content": "u" * 40 + "hello"}]
    body = {"models": ["parrot", "default"], "messages": messages}

    async def after(salt: str) -> int:
        reply = await service.client.post("/v1/compare", json={**body, "cache_salt": salt})
        assert reply.status_code == 200, reply.text
        return cached(await streamed(service, CHAT, messages=messages, cache_salt=salt))

    assert await after("first") > 0
    assert cached(await streamed(service, CHAT, messages=messages, cache_salt="second")) == 0


async def guesses(service: Service, start: list[int], salt: str) -> list[int]:
    """What a spy is told of its guesses at the four tokens after `start`, one token after the other."""
    told = []
    known: list[int] = []
    for _ in range(4):
        counts = [
            cached(
                (await service.complete([*start, *known, digit, 90], max_tokens=1, cache_salt=salt))["usage"]
            )
            for digit in range(10)
        ]
        known.append(counts.index(max(counts)))
        told += counts
    return told


async def test_cached_tokens_tell_nothing_of_another_owners_prompt(service: Service) -> None:
    secret = [4, 2, 7, 1]
    watched, untouched = [6] * 20, [11] * 20
    await service.complete([*watched, *secret, 5], max_tokens=2, cache_salt="owner")
    assert await guesses(service, watched, "spy") == await guesses(service, untouched, "spy")


@pytest.mark.parametrize("salt", ["", 5, "x" * 257])
async def test_a_bad_cache_salt_is_refused(service: Service, salt: object) -> None:
    reply = await service.client.post(COMPLETIONS, json={"prompt": [1, 2], "cache_salt": salt})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "cache_salt"


async def test_metrics_count_them(service: Service) -> None:
    for _ in range(2):
        await service.chat("t" * 20 + "hello")
    text = (await service.client.get("/metrics")).text
    values = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line[0] != "#"}
    assert values["graft_cached_tokens_total"] > 0
    assert values["graft_prompt_cache_hits_total"] > 0
    assert values["graft_prompt_cache_evictions_total"] == 0
    assert values["graft_batch_adapters"] == 0
