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


async def test_metrics_count_them(service: Service) -> None:
    for _ in range(2):
        await service.chat("t" * 20 + "hello")
    text = (await service.client.get("/metrics")).text
    values = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line[0] != "#"}
    assert values["graft_cached_tokens_total"] > 0
    assert values["graft_prompt_cache_hits_total"] > 0
    assert values["graft_prompt_cache_evictions_total"] == 0
    assert values["graft_batch_adapters"] == 0
