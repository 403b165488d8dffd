"""Parameters: each is served as asked, or asks for nothing, or is a 400 that names it."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import mlx_lm.server
import pytest
import pytest_asyncio
from openai.types import completion_create_params as completion_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_params

from server.openai.fields import AdapterWeight, Wire
from server.openai.parameters import Parameter, vocabulary
from server.openai.wire import (
    ChatRequest,
    CompareRequest,
    CompletionRequest,
    Message,
    StreamOptions,
    TemplateOptions,
    TextPart,
)
from tests.api.asking import CALLS, Answered, answered, refused, said, watched_service
from tests.api.parrot import CONTEXT_TOKENS
from tests.api.serving import CHAT, COMPLETIONS, Service
from tests.api.test_compare import COMPARE

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODELS: dict[str, list[type[Wire]]] = {
    "request": [ChatRequest, CompletionRequest, CompareRequest],
    "stream_options": [StreamOptions],
    "message": [Message],
    "part": [TextPart],
    "adapter": [AdapterWeight],
    "chat_template_kwargs": [TemplateOptions],
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with watched_service(tmp_path_factory.mktemp("adapters")) as started:
        yield started


# The table and the wire models


async def test_parameters_that_are_served_are_the_fields_of_the_wire_models() -> None:
    for kind, models in MODELS.items():
        known = vocabulary(kind).parameters
        served = {name for name, parameter in known.items() if parameter.treatment == "served"}
        assert served == {name for model in models for name in model.model_fields}, kind


async def test_parameters_have_sources_and_depend_on_known_ones() -> None:
    for kind in MODELS:
        known = vocabulary(kind).parameters
        for name, parameter in known.items():
            assert parameter.sources, name
            assert {*parameter.only_with, parameter.same_as} - {None} <= known.keys(), name


async def test_parameters_hold_all_of_the_installed_openai_library() -> None:
    for params, models in ((chat_params, "request"), (completion_params, "request")):
        names = params.CompletionCreateParamsBase.__annotations__.keys()
        assert names <= vocabulary(models).parameters.keys()
    assert (
        ChatCompletionStreamOptionsParam.__annotations__.keys()
        <= vocabulary("stream_options").parameters.keys()
    )
    for message in (ChatCompletionAssistantMessageParam, ChatCompletionUserMessageParam):
        assert message.__annotations__.keys() <= vocabulary("message").parameters.keys()


async def test_parameters_hold_all_that_the_installed_mlx_lm_server_reads() -> None:
    source = inspect.getsource(mlx_lm.server)
    names = set(re.findall(r'self\.body(?:\.get\(|\[)"(\w+)"', source))
    assert {"adapters", "xtc_threshold", "prompt"} <= names
    assert names <= vocabulary("request").parameters.keys()


# Served: with each value, something is other than without it


def sampled(
    name: str, value: Any, expected: Any = None
) -> tuple[dict[str, Any], Callable[[Answered], Any], Any]:
    expected = value if expected is None else expected
    return {name: value}, lambda answer: getattr(answer.submit.sampling, name), expected


def limited(name: str, value: Any, expected: int) -> tuple[dict[str, Any], Callable[[Answered], Any], Any]:
    return {name: value}, lambda answer: answer.submit.max_tokens, expected


def weights(answer: Answered) -> Any:
    return answer.weights


def prompt(answer: Answered) -> Any:
    return answer.prompt


# name, call, fields, what shows it, and how
SERVED: list[tuple[str, str, dict[str, Any], Callable[[Answered], Any], Any]] = [
    (name, CHAT, *case)
    for name, case in {
        "temperature": sampled("temperature", 0.25),
        "top_p": sampled("top_p", 0.5),
        "top_p 0": sampled("top_p", 0, 0.0),
        "top_k": sampled("top_k", 7),
        "top_k 7.0": sampled("top_k", 7.0, 7),
        "min_p": sampled("min_p", 0.125),
        "seed": sampled("seed", 11),
        "seed 11.0": sampled("seed", 11.0, 11),
        "repetition_penalty": sampled("repetition_penalty", 1.5),
        "presence_penalty": sampled("presence_penalty", 0.5),
        "frequency_penalty": sampled("frequency_penalty", -0.5),
        "logit_bias": sampled("logit_bias", {"3": 1.5}, ((3, 1.5),)),
        "max_tokens": limited("max_tokens", 3, 3),
        "max_tokens 3.0": limited("max_tokens", 3.0, 3),
        "max_completion_tokens": limited("max_completion_tokens", 4, 4),
        "max_new_tokens": limited("max_new_tokens", 5, 5),
        "n_predict": limited("n_predict", 6, 6),
    }.items()
]
SERVED += [
    ("model", CHAT, {"model": "echo"}, lambda answer: answer.reply.json()["model"], "echo"),
    (
        "models",
        COMPARE,
        {"models": ["echo", "parrot"]},
        lambda answer: [one["model"] for one in answer.reply.json()["answers"]],
        ["echo", "parrot"],
    ),
    ("adapters", CHAT, {"adapters": [{"id": "echo", "weight": 0.5}]}, weights, [0.5]),
    ("adapters by name", CHAT, {"adapters": "echo"}, weights, [1.0]),
    ("lora_path", CHAT, {"lora_path": "echo"}, weights, [1.0]),
    ("lora_path beside the same model", CHAT, {"lora_path": "echo", "model": "echo"}, weights, [1.0]),
    ("lora_path beside the base", COMPLETIONS, {"lora_path": "echo", "model": "parrot"}, weights, [1.0]),
    ("adapter_id", COMPLETIONS, {"adapter_id": "echo"}, weights, [1.0]),
    ("messages", CHAT, said(content="hello"), prompt, "user///hello"),
    ("prompt", COMPLETIONS, {"prompt": "hello"}, prompt, "hello"),
    (
        "prompt",
        COMPLETIONS,
        {"prompt": [3.0, 4], "max_tokens": 1},
        lambda answer: answer.submit.prompt_tokens,
        (3, 4),
    ),
    (
        "chat_template_kwargs",
        CHAT,
        {"chat_template_kwargs": {"enable_thinking": True}},
        prompt,
        "thinks user///greek",
    ),
    ("add_generation_prompt", CHAT, {"add_generation_prompt": False}, prompt, "ends user///greek"),
    (
        "continue_final_message",
        CHAT,
        {"messages": [{"role": "assistant", "content": "greek"}], "continue_final_message": True},
        prompt,
        "ends assistant///greek",
    ),
    (
        "stream",
        CHAT,
        {"stream": True},
        lambda answer: answer.reply.headers["content-type"][:17],
        "text/event-stream",
    ),
    (
        "stream_options",
        CHAT,
        {"stream": True, "stream_options": {"include_usage": True}},
        lambda answer: '"usage":{' in answer.reply.text,
        True,
    ),
    ("n", CHAT, {"n": 2.0}, lambda answer: len(answer.reply.json()["choices"]), 2),
    ("stop", CHAT, {"stop": ["ta"]}, lambda answer: answer.text, "alphabe"),
    ("stop", COMPLETIONS, {"stop": "ta"}, lambda answer: answer.text, "alphabe"),
    ("logprobs", CHAT, {"logprobs": True}, lambda answer: answer.submit.sampling.top_logprobs, 0),
    ("logprobs", COMPLETIONS, {"logprobs": 2.0}, lambda answer: answer.submit.sampling.top_logprobs, 2),
    (
        "top_logprobs",
        CHAT,
        {"logprobs": True, "top_logprobs": 3},
        lambda answer: answer.submit.sampling.top_logprobs,
        3,
    ),
    ("cache_salt", CHAT, {"cache_salt": "pepper"}, lambda answer: answer.submit.cache_owner, "pepper"),
    ("message.role", CHAT, said(role="developer"), prompt, "system///greek"),
    ("message.content", CHAT, said(content=[{"type": "text", "text": "hello"}]), prompt, "user///hello"),
    ("message.name", CHAT, said(name="Bo"), prompt, "user/Bo//greek"),
    ("message.reasoning_content", CHAT, said(reasoning_content="so"), prompt, "user//so/greek"),
    ("message.reasoning", CHAT, said(reasoning="so"), prompt, "user//so/greek"),
]


@pytest.mark.parametrize(
    ("name", "path", "fields", "shows", "expected"),
    SERVED,
    ids=[f"{case[0]}-{case[1][4:]}" for case in SERVED],
)
async def test_what_is_served_shows(
    service: Service,
    name: str,
    path: str,
    fields: dict[str, Any],
    shows: Callable[[Answered], Any],
    expected: Any,
) -> None:
    assert shows(await answered(service, fields, path)) == expected
    if name != "stream_options":
        assert shows(await answered(service, {}, path)) != expected


async def test_each_served_parameter_of_requests_has_such_a_test() -> None:
    tested = {name.split()[0] for name, *_ in SERVED}
    served = {name for name, known in vocabulary("request").parameters.items() if known.treatment == "served"}
    assert served <= tested


async def test_no_limit_is_all_that_the_context_has_room_for(service: Service) -> None:
    for name in ("max_tokens", "max_completion_tokens", "max_new_tokens", "n_predict"):
        submit = (await answered(service, {name: -1})).submit
        assert submit.max_tokens == CONTEXT_TOKENS - len(submit.prompt_tokens), name


async def test_a_seed_of_minus_one_is_none(service: Service) -> None:
    assert (await answered(service, {"seed": -1})).submit.sampling.seed is None


@pytest.mark.parametrize("stop", [None, "", [], [""], ["", "zzz"], ["zzz"] * 256])
async def test_stop_strings_that_stop_nothing(service: Service, stop: Any) -> None:
    assert (await answered(service, {"stop": stop})).text == "alphabetagamma"


async def test_one_of_many_stop_strings(service: Service) -> None:
    stops = [f"{index}" * 20 for index in range(200)] + ["ta"]
    assert (await answered(service, {"stop": stops})).text == "alphabe"


async def test_top_p_of_0_is_the_likeliest_token(service: Service) -> None:
    hot = {"temperature": 2, "logit_bias": {"40": 30, "41": 29.5}, "max_tokens": 8}
    greedy = (await answered(service, {**hot, "temperature": 0})).text
    assert (await answered(service, {**hot, "top_p": 0})).text == greedy
    drawn = {(await answered(service, {**hot, "seed": seed})).text for seed in range(4)}
    assert drawn != {greedy}


# Requests at random

# Fields that say the same thing, or that others need: at most one of each set in a request.
APART = [
    {"stop", "max_tokens", "max_completion_tokens", "max_new_tokens", "n_predict"},
    {"stop", "prompt", "messages"},
    {"model", "models", "adapters", "lora_path", "adapter_id"},
    {"messages", "prompt", "continue_final_message", "add_generation_prompt", "chat_template_kwargs"},
    {"stream", "stream_options", "n", "n_cmpl", "best_of", "logprobs", "top_logprobs", "stop", "logit_bias"},
]
ASKING = [7.25, "asked", ["asked"], {"asked": 1}]


@dataclass(slots=True)
class Drawn:
    """A request at random: what shows that it is served, or the fields of which a refusal names one."""

    path: str
    fields: dict[str, Any]
    shown: list[tuple[Callable[[Answered], Any], Any]]
    wrong: set[str]

    def is_free_for(self, name: str, known: dict[str, Parameter]) -> bool:
        """Whether `name` can come in without changing what the fields that are there ask for."""
        tied = {name, *known[name].only_with}
        tied |= {other for other, parameter in known.items() if name in parameter.only_with}
        tied |= set().union(*(group for group in APART if name in group))
        return tied.isdisjoint(self.fields)


def drawn(draw: random.Random) -> Drawn:
    path = draw.choice(list(CALLS))
    known = dict(vocabulary("request", "completions" if path == COMPLETIONS else "chat").parameters)
    own = CALLS[path].model_fields
    request = Drawn(path, {}, [], set())
    served = [case for case in SERVED if case[1] == path and case[0].split()[0] in own]
    for name, _, fields, shows, expected in draw.sample(served, draw.randint(0, min(3, len(served)))):
        if request.is_free_for(name.split()[0], known):
            request.fields |= fields
            request.shown.append((shows, expected))
    others = [name for name in known if name not in own]
    for name in draw.sample(others, draw.randint(1, 6)):
        parameter = known[name]
        anything = parameter.treatment == "free" or parameter.only_with
        values = ASKING if anything else parameter.harmless
        if values and request.is_free_for(name, known):
            request.fields[name] = draw.choice(values)
    if path != COMPARE and draw.random() < 0.3:
        request.fields["x_of_a_stranger"] = draw.choice(ASKING)
    if draw.random() < 0.5:
        spoil(request, draw, known, others)
    return request


def spoil(request: Drawn, draw: random.Random, known: dict[str, Parameter], others: list[str]) -> None:
    own = CALLS[request.path].model_fields
    kind = draw.choice(["another's", "another's", "dependent", "misspelt", "of a wrong type"])
    if kind == "another's":
        free = [name for name in others if known[name].treatment != "free" and not known[name].only_with]
        wrong = {name: draw.choice(ASKING) for name in draw.sample(free, draw.randint(1, 3))}
    elif kind == "dependent":
        child = draw.choice([name for name in others if known[name].only_with])
        parent = draw.choice(known[child].only_with)
        request.fields[parent] = 0.5 if parent in own else 7.25
        wrong = {child: 7.25}
    elif kind == "misspelt":
        name = draw.choice([name for name in own if len(name) > 6])
        place = draw.randrange(1, len(name) - 1)
        wrong = {name[:place] + name[place + 1 :]: 1}
    else:
        wrong = {draw.choice(list(own)): {"wrong": "type"}}
    request.fields |= wrong
    request.wrong |= wrong.keys()


@pytest.mark.parametrize("seed", range(4))
async def test_fields_at_random_are_served_or_harmless_or_named(service: Service, seed: int) -> None:
    draw = random.Random(seed)
    served = refusals = 0
    for _ in range(50):
        request = drawn(draw)
        if request.wrong:
            error = await refused(service, request.fields, request.path)
            assert any(name in error["message"] for name in request.wrong), (request, error)
            if error["code"] == "unsupported_parameter":
                assert all(f"'{name}'" in error["message"] for name in request.wrong), (request, error)
            refusals += 1
        else:
            answer = await answered(service, request.fields, request.path)
            for shows, expected in request.shown:
                assert shows(answer) == expected, request
            served += len(request.shown)
    assert min(served, refusals) > 10
