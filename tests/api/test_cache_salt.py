"""`cache_salt` keeps prompt caches apart: neither `usage` nor a shared reading tells of another's prompt."""

from __future__ import annotations

import pytest

from tests.api.serving import CHAT, COMPLETIONS, Service
from tests.api.test_cached_tokens import cached, streamed

pytestmark = pytest.mark.asyncio(loop_scope="module")


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
