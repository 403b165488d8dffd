"""Comparison over a real connection and by the command line, with the demo's model and adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.e2e.running import BASE, Served, run, until

MODELS = [BASE, "pirate"]
QUESTION = "What is the sea?"
FIELDS = {
    "messages": [{"role": "user", "content": QUESTION}],
    "models": MODELS,
    "temperature": 0,
    "max_tokens": 8,
}


@contextmanager
def streamed(demo: Served, **fields: Any) -> Iterator[Iterator[str]]:
    """The data of the events as they come."""
    with demo.http.stream("POST", "/v1/compare", json={**FIELDS, "stream": True, **fields}) as reply:
        assert reply.status_code == 200
        yield (line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: "))


def test_answers_and_scores_are_those_of_separate_chats(demo: Served) -> None:
    whole = demo.ask("POST", "/v1/compare", json=FIELDS)
    for index, (model, answer) in enumerate(zip(MODELS, whole["answers"], strict=True)):
        body = {**FIELDS, "models": None, "model": model, "logprobs": True}
        alone = demo.ask("POST", "/v1/chat/completions", json=body)["choices"][0]
        assert answer["message"] == alone["message"]
        assert answer["finish_reason"] == alone["finish_reason"]
        told = alone["logprobs"]["content"]
        assert [token["bytes"] for token in answer["tokens"]] == [token["bytes"] for token in told]
        own = [token["logprobs"][index] for token in answer["tokens"]]
        assert own == pytest.approx([token["logprob"] for token in told], abs=1e-4)
        assert max(answer["mean_differences"]) == answer["mean_differences"][index] == 0

    with streamed(demo) as datas:
        *chunks, done = datas
    assert done == "[DONE]"
    choices = [choice for chunk in chunks for choice in json.loads(chunk)["choices"]]
    first = [next(at for at, choice in enumerate(choices) if choice["index"] == index) for index in range(2)]
    last = [
        max(at for at, c in enumerate(choices) if c["index"] == i and "tokens" not in c) for i in range(2)
    ]
    assert max(first) < min(last), "together"
    assert max(last) < len(choices) - 2, "scores after all answers"
    for answer in whole["answers"]:
        mine = [choice for choice in choices if choice["index"] == answer["index"]]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == answer["message"]["content"]
        assert mine[-1]["mean_logprobs"] == pytest.approx(answer["mean_logprobs"], abs=1e-4)


def test_a_client_that_leaves_frees_what_was_pinned(demo: Served) -> None:
    no_end = {"0": -100, "2": -100}
    with streamed(demo, max_tokens=4000, logit_bias=no_end) as datas:
        for _ in range(8):
            next(datas)
        assert demo.adapters()["pirate"]["in_flight"] == 1
    until(lambda: not any(adapter["in_flight"] for adapter in demo.adapters().values()))


def test_the_command(demo: Served) -> None:
    arguments = ("compare", QUESTION, "--models", "base, pirate", "--max-tokens", "8")
    done = run(*arguments, url=demo.url)
    assert (done.code, done.err) == (0, "")
    printed = json.loads(run(*arguments, "--json", url=demo.url).out)
    assert printed["models"] == MODELS
    for index, answer in enumerate(printed["answers"]):
        assert answer["message"]["content"].split()[0] in done.out
        assert f"{answer['mean_differences'][1 - index]:+.2f}" in done.out

    unknown = run("compare", "Hello", "--models", "base,nobody", url=demo.url)
    assert (unknown.code, unknown.out) == (1, "")
    assert "'nobody' is not served" in unknown.err
