"""inspect_ai's provider for vLLM, on a server that runs: adapters by name, by path, by owner and name."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import inspect_ai
import pytest
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageUser,
    GenerateConfig,
    Model,
    get_model,
    get_model_info,
)
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

from tests.clients.conftest import CONTEXT_TOKENS, LONG, QUESTION
from tests.e2e.running import BASE, Served

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 16}


def model(url: str, adapter: str | None = None) -> Model:
    name = f"vllm/{BASE}" if adapter is None else f"vllm/{BASE}:{adapter}"
    return get_model(name, base_url=url, api_key="none", memoize=False)


def answer(asked: Model, text: Any = QUESTION, **config: Any) -> Any:
    return asyncio.run(asked.generate(text, config=GenerateConfig(**{**GREEDY, **config})))


def test_an_adapter_that_nothing_has_loaded(server: Served, url: str) -> None:
    assert "emoji" not in server.adapters()
    asked = model(url, "emoji")
    said = answer(asked)
    assert said.stop_reason in ("stop", "max_tokens")
    assert said.completion != answer(model(url)).completion
    assert "emoji" in server.adapters()


def test_an_adapter_by_its_path(server: Served, url: str, adapters_root: Path, pirate_answer: str) -> None:
    path = str(adapters_root / "pirate")
    assert answer(model(url, path)).completion == pirate_answer
    assert server.adapters()[path]["path"] == "pirate"


def test_an_adapter_by_owner_and_name(server: Served, url: str) -> None:
    assert answer(model(url, "someone/robot-lora")).completion == answer(model(url, "robot")).completion
    assert server.adapters()["someone/robot-lora"]["path"] == "someone/robot-lora"


def test_an_adapter_that_is_not_there(url: str) -> None:
    with pytest.raises(RuntimeError, match="not registered"):
        answer(model(url, "nobody"))


@pytest.mark.parametrize("adapter", [None, "pirate"])
def test_a_prompt_that_is_too_long_ends_with_model_length(url: str, adapter: str | None) -> None:
    assert answer(model(url, adapter), LONG).stop_reason == "model_length"
    assert answer(model(url, adapter), max_tokens=CONTEXT_TOKENS).stop_reason == "model_length"


def test_the_contexts_length_is_found_out(url: str) -> None:
    asked = model(url, "pirate")
    answer(asked)
    info = get_model_info(asked)
    assert info is not None
    assert info.context_length == CONTEXT_TOKENS


def test_what_an_evaluation_may_wish(url: str) -> None:
    said = answer(
        model(url, "pirate"), logprobs=True, top_logprobs=3, num_choices=2, seed=1, stop_seqs=["matey"]
    )
    assert len(said.choices) == 2
    for choice in said.choices:
        assert "matey" not in choice.message.text
        assert all(len(score.top_logprobs) == 3 for score in choice.logprobs.content)
    said = answer(model(url), frequency_penalty=0.5, presence_penalty=0.5, top_p=0.9, logit_bias={42: -100})
    assert said.completion


def test_an_answer_that_has_begun_goes_on(url: str, pirate_answer: str) -> None:
    begun = pirate_answer[: len(pirate_answer) // 2].rpartition(" ")[0]
    messages = [ChatMessageUser(content=QUESTION), ChatMessageAssistant(content=begun)]
    said = answer(model(url, "pirate"), messages)
    assert pirate_answer.startswith(begun + said.completion[:4])


def test_a_whole_evaluation_with_an_adapter(url: str, tmp_path: Path) -> None:
    task = inspect_ai.Task(
        dataset=[Sample(input=QUESTION, target="Rome"), Sample(input=LONG, target="nothing")],
        solver=generate(),
        scorer=includes(),
        config=GenerateConfig(**GREEDY),
    )
    (log,) = inspect_ai.eval(
        task, model=model(url, "pirate"), log_dir=str(tmp_path), display="none", fail_on_error=True
    )
    assert log.status == "success"
    assert log.samples is not None
    short, long = log.samples
    assert short.scores is not None
    assert short.scores["includes"].value == "C"
    assert long.output.stop_reason == "model_length"
