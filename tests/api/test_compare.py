"""Comparison: answers and scores are those of separate chats, whole and streamed; nothing stays behind."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import pytest_asyncio
from mlx_lm.tuner.utils import load_adapters

from server.adapters.registry import Registry
from server.engine.engine import Engine
from server.engine.errors import EngineOverloadedError
from server.engine.loop import LoopStats
from server.engine.model import LoadedModel
from server.openai.text import TextDecoder
from tests.api.parrot import load_parrot
from tests.api.serving import Service, Visitor, serving
from tests.models import adapter_tensors, adapter_values, write_adapter

pytestmark = pytest.mark.asyncio(loop_scope="module")

COMPARE = "/v1/compare"
MODELS = ["parrot", "echo", "loud"]
# How large the entries of an adapter are: one changes how likely things are, the other what is said.
SIZES = {"echo": 0.05, "loud": 0.3, "other": 0.1}


def own_parrot() -> LoadedModel:
    """Always the same weights, also of the attention, which only adapters bring in."""
    mx.random.seed(8)
    return load_parrot()


def write_adapters(parrot: LoadedModel, root: Path) -> Path:
    for seed, (name, size) in enumerate(SIZES.items()):
        values = adapter_values(keys=["self_attn.v_proj", "self_attn.o_proj"])
        write_adapter(root / name, values, adapter_tensors(parrot.model, values, seed=seed, size=size))
    return root


@pytest.fixture(scope="module")
def parrot() -> LoadedModel:
    return own_parrot()


@pytest.fixture(scope="module")
def adapters_root(parrot: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(parrot, tmp_path_factory.mktemp("adapters"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(parrot: LoadedModel, adapters_root: Path) -> AsyncIterator[Service]:
    async with serving(parrot, adapters_dir=adapters_root) as started:
        yield started


def body(word: str = "sing", models: Any = MODELS, **fields: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": word}],
        "models": models,
        "temperature": 0,
        "max_tokens": 12,
        **fields,
    }


async def compare(service: Service, *args: Any, **fields: Any) -> dict[str, Any]:
    reply = await service.client.post(COMPARE, json=body(*args, **fields))
    assert reply.status_code == 200, reply.text
    return reply.json()


async def chat_of(service: Service, model: str, word: str, **fields: Any) -> dict[str, Any]:
    fields = {"temperature": 0, "max_tokens": 12, **fields}
    return (await service.chat(word, model=model, logprobs=True, **fields))["choices"][0]


def registry_of(service: Service) -> Registry:
    return service.app.state.adapters.registry


async def until(service: Service, holds: Callable[[LoopStats], object]) -> None:
    """Wait until this holds of what the engine computes."""
    async with asyncio.timeout(60):
        while not holds(service.engine.stats):
            await service.engine.container.perform(lambda context: None)


async def idle(service: Service) -> None:
    await until(service, lambda stats: not (stats.running_requests or stats.waiting_requests))


@pytest.mark.parametrize(
    ("word", "fields"),
    [
        ("sing", {}),
        ("greek", {"stop": "tag"}),
        ("hello", {}),
        ("accent", {"max_tokens": 7}),
        ("country", {"temperature": 1.5, "seed": 4, "top_p": 0.9}),
    ],
)
async def test_answers_and_own_scores_are_those_of_separate_chats(
    service: Service, word: str, fields: dict[str, Any]
) -> None:
    answer = await compare(service, word, **fields)
    assert answer["models"] == MODELS
    assert [one["index"] for one in answer["answers"]] == [0, 1, 2]
    for index, (model, one) in enumerate(zip(MODELS, answer["answers"], strict=True)):
        alone = await chat_of(service, model, word, **fields)
        assert one["model"] == model
        assert one["message"] == alone["message"]
        assert one["finish_reason"] == alone["finish_reason"]
        told = alone["logprobs"]["content"]
        assert [(token["token"], token["bytes"]) for token in one["tokens"]] == [
            (token["token"], token["bytes"]) for token in told
        ]
        own = [token["logprobs"][index] for token in one["tokens"]]
        assert own == pytest.approx([token["logprob"] for token in told], abs=1e-4)


def adapted(root: Path, name: str) -> Any:
    """The parrot under one of the names, by mlx-lm alone."""
    model = own_parrot().model
    if name != "parrot":
        model = load_adapters(model, str(root / name))
        model.eval()
    return model


async def test_each_answer_is_scored_under_each_model(
    service: Service, parrot: LoadedModel, adapters_root: Path
) -> None:
    """Also those that a model would not give: a forward of mlx-lm's own says how likely they are."""
    answer = await compare(service, "greek", temperature=1.9, seed=3, max_tokens=9)
    decoder = TextDecoder(parrot.info.tokenizer)
    ids = {decoder.token_bytes(token): token for token in range(parrot.info.vocabulary_tokens)}
    (prompt,) = parrot.info.tokenizer.encode("greek", add_special_tokens=False)
    said = [[ids[bytes(token["bytes"])] for token in one["tokens"]] for one in answer["answers"]]
    assert len({tuple(tokens) for tokens in said}) > 1  # or this would show little
    for index, name in enumerate(MODELS):
        model = adapted(adapters_root, name)
        for one, tokens in zip(answer["answers"], said, strict=True):
            logits = model(mx.array([[prompt, *tokens]]))[0, :-1]
            expected = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            expected = expected[np.arange(len(tokens)), tokens]
            scores = [token["logprobs"][index] for token in one["tokens"]]
            assert scores == pytest.approx(expected.tolist(), abs=1e-4)
            assert one["mean_logprobs"][index] == pytest.approx(expected.mean(), abs=1e-4)
    for one in answer["answers"]:
        own = one["mean_logprobs"][one["index"]]
        assert one["mean_differences"] == [mean - own for mean in one["mean_logprobs"]]
        assert one["mean_differences"][one["index"]] == 0


async def test_what_it_took(service: Service) -> None:
    word = "x" * 40 + "hello"
    first, again = [(await compare(service, word, ["parrot", "echo"]))["usage"] for _ in range(2)]
    assert first["prompt_tokens"] == 2 * 41
    assert first["completion_tokens"] == 2 * 4
    assert first["total_tokens"] == 2 * 45
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    assert again["prompt_tokens_details"] == {"cached_tokens": 2 * 40}
    text = (await service.client.get("/metrics")).text
    values = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line[0] != "#"}
    assert values["graft_scored_tokens_total"] >= 2 * 2 * 2 * 3
    assert values["graft_scoring_rows"] == 0
    label = 'graft_http_requests_total{method="POST",route="/v1/compare",status="200"}'
    assert any(line.startswith(label) for line in text.splitlines())


async def test_an_empty_answer_has_no_scores(service: Service) -> None:
    answer = await compare(service, "silence", ["parrot", "echo"])
    for one in answer["answers"]:
        assert one["message"]["content"] == ""
        assert one["finish_reason"] == "stop"
        assert one["tokens"] == []
        assert one["mean_logprobs"] == one["mean_differences"] == [None, None]


async def test_an_empty_answer_beside_another(service: Service) -> None:
    answer = await compare(service, "hello", ["parrot", "loud"], stop="Hi")
    base, loud = answer["answers"]
    assert (base["message"]["content"], base["mean_logprobs"]) == ("", [None, None])
    assert len(loud["tokens"]) > 1
    assert all(mean < 0 for mean in loud["mean_logprobs"])


async def test_names_are_those_of_chat_and_what_they_meant_is_told(service: Service) -> None:
    names = ["default", "parrot:echo", "parrot"]
    answer = await compare(service, "hello", names)
    assert answer["models"] == names
    assert [one["model"] for one in answer["answers"]] == ["parrot", "echo", "parrot"]
    base, echo, again = (one["mean_logprobs"] for one in answer["answers"])
    assert base[0] == pytest.approx(base[2], abs=1e-5)
    assert base == pytest.approx(again, abs=1e-5)
    assert len(echo) == 3


async def test_models_without_a_seed_draw_alike(service: Service) -> None:
    answer = await compare(service, "sing", ["parrot", "default"], temperature=2)
    first, second = (one["message"]["content"] for one in answer["answers"])
    assert first == second


async def test_eight_models_of_which_some_are_loaded_on_demand(service: Service) -> None:
    names = [
        "parrot",
        "default",
        "",
        *(f"{prefix}{name}" for name in SIZES for prefix in ("", "parrot:")),
    ]
    answer = await compare(service, "hello", names[:8])
    assert len(answer["answers"]) == 8
    assert all(len(one["mean_logprobs"]) == 8 for one in answer["answers"])


# Streams


async def test_a_stream_brings_the_answers_and_then_the_scores(service: Service) -> None:
    whole = await compare(service, "greek")
    *chunks, done = await service.events(COMPARE, **body("greek"))
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"comparison.chunk"}
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert chunks[0]["id"].startswith("cmp-")
    assert all(chunk["models"] == MODELS and "usage" not in chunk for chunk in chunks)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [choice["index"] for choice in choices[:3]] == [0, 1, 2]
    assert all(choice["delta"] == {"role": "assistant", "content": ""} for choice in choices[:3])
    assert all("tokens" in choice for choice in choices[-3:])
    assert all("tokens" not in choice for choice in choices[:-3])
    assert [choice["index"] for choice in choices[3:6]] == [0, 1, 2]  # together, not one after the other
    for one in whole["answers"]:
        mine = [choice for choice in choices if choice["index"] == one["index"]]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == one["message"]["content"]
        reasons = [choice["finish_reason"] for choice in mine]
        assert reasons == [None] * (len(reasons) - 2) + [one["finish_reason"], None]
        assert {choice["model"] for choice in mine} == {one["model"]}
        assert mine[-1]["mean_logprobs"] == pytest.approx(one["mean_logprobs"], abs=1e-5)
        assert len(mine[-1]["tokens"]) == len(one["tokens"])


async def test_a_stream_with_usage_has_null_in_all_chunks_and_one_more(service: Service) -> None:
    *chunks, last, done = await service.events(
        COMPARE, **body("hello", ["parrot", "echo"], stream_options={"include_usage": True})
    )
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 8)


# Refusals

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": None}, "messages", "is required"),
    ({"models": None}, "models", "is required"),
    ({"models": "parrot"}, "models", "valid list, but is 'parrot'"),
    ({"models": []}, "models", "at least 2 items"),
    ({"models": ["parrot"]}, "models", "at least 2 items"),
    ({"models": [f"m{index}" for index in range(9)]}, "models", "at most 8 items"),
    ({"models": ["parrot", "echo", "parrot"]}, "models", "each model once"),
    ({"models": ["parrot", 5]}, "models[1]", "valid string, but is 5"),
    ({"models": ["parrot", "x" * 301]}, "models[1]", "at most 300"),
    ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
    ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "equal"),
    ({"max_tokens": 511}, "max_tokens", "maximum context length is"),
    ({"stop": 5}, "stop", "a string or a list of strings"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "below"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "together with 'stream'"),
    *(
        ({name: value}, name, f"Not supported by this server: '{name}'")
        for name, value in {
            "model": "echo",
            "adapters": [{"id": "echo"}],
            "n": 2,
            "logprobs": True,
            "top_logprobs": 3,
            "tools": [{}],
            "response_format": {"type": "json_object"},
            "prompt_logprobs": 1,
        }.items()
    ),
]


@pytest.mark.parametrize(("fields", "param", "says"), WRONG, ids=str)
async def test_bad_input_is_a_400_that_says_what_is_wrong(
    service: Service, fields: dict[str, Any], param: str, says: str
) -> None:
    reply = await service.client.post(COMPARE, json={**body("xsing"), **fields})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert registry_of(service).in_flight == 0


async def test_harmless_fields_change_nothing(service: Service) -> None:
    more = {"n": 1, "logprobs": False, "adapters": [], "model": None, "tools": [], "user": "someone"}
    plain, same = await compare(service, "hello"), await compare(service, "hello", **more)
    assert [one["message"] for one in same["answers"]] == [one["message"] for one in plain["answers"]]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unknown_name_is_a_404_that_lists_what_is_served(service: Service, stream: bool) -> None:
    reply = await service.client.post(COMPARE, json=body("hello", ["echo", "gpt-9"], stream=stream))
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "models")
    assert "gpt-9" in error["message"]
    assert "parrot" in error["message"]
    assert registry_of(service).in_flight == 0


async def test_it_asks_for_the_key(parrot: LoadedModel) -> None:
    async with serving(parrot, api_key="a-long-enough-secret") as service:
        assert (await service.client.post(COMPARE, json=body())).status_code == 401


# Ends


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("scores_too", [False, True])
async def test_a_client_that_leaves_ends_the_computing_and_frees_what_was_pinned(
    service: Service, stream: bool, scores_too: bool
) -> None:
    await idle(service)
    registry = registry_of(service)
    before = service.engine.stats
    fields = {"max_tokens": 150 if scores_too else 450, "stream": stream}
    visitor = Visitor(service.app, COMPARE, json.dumps(body(**fields)).encode())
    visit = asyncio.create_task(visitor.visit())
    await until(service, lambda stats: stats.scoring_rows if scores_too else stats.running_rows)
    # Once all is generated, each model is kept for as long as its own scoring takes.
    assert 1 <= registry.in_flight <= 3 if scores_too else registry.in_flight == 3
    visitor.gone.set()
    await asyncio.wait_for(visit, 60)
    await idle(service)
    assert registry.in_flight == registry.get("echo").in_flight == 0
    assert service.engine.stats.completion_tokens - before.completion_tokens <= 3 * 150
    assert service.engine.stats.scoring_rows == 0


async def test_an_engine_that_fails_is_told_and_frees_what_was_pinned(service: Service) -> None:
    reply = await service.client.post(COMPARE, json=body("fall", stream=True))
    assert reply.status_code == 200
    assert "generation_failed" in reply.text
    assert "[DONE]" not in reply.text
    assert "passwd" not in reply.text
    await idle(service)
    assert registry_of(service).in_flight == 0


async def test_versions_do_not_change_under_it(service: Service, adapters_root: Path) -> None:
    """An adapter that is replaced while it answers is scored as it answered."""
    before = await compare(service, "sing", max_tokens=60)
    visitor = Visitor(service.app, COMPARE, json.dumps(body(max_tokens=60, stream=True)).encode())
    visit = asyncio.create_task(visitor.visit())
    await until(service, lambda stats: stats.running_rows)
    tensors = (adapters_root / "echo" / "adapters.safetensors").read_bytes()
    (adapters_root / "echo" / "adapters.safetensors").write_bytes(
        (adapters_root / "loud" / "adapters.safetensors").read_bytes()
    )
    try:
        replaced = await service.client.post("/v1/adapters", json={"id": "echo", "replace": True})
        assert replaced.status_code == 200, replaced.text
        await asyncio.wait_for(visit, 60)
        text = b"".join(
            [visitor.messages.get_nowait().get("body", b"") for _ in range(visitor.messages.qsize())]
        )
        datas = [
            line.removeprefix("data: ") for line in text.decode().split("\n\n") if line.startswith("data: {")
        ]
        scored = {
            choice["index"]: choice["mean_logprobs"]
            for data in datas
            for choice in json.loads(data)["choices"]
            if "mean_logprobs" in choice
        }
        for one in before["answers"]:
            assert scored[one["index"]] == pytest.approx(one["mean_logprobs"], abs=1e-4)
        after = await compare(service, "sing", max_tokens=60)
        echo, loud = after["answers"][1], after["answers"][2]
        assert echo["message"] == loud["message"]
        assert echo["mean_logprobs"] == pytest.approx(loud["mean_logprobs"], abs=1e-4)
        old, new = (await compare(service, "sing", ["echo@1", "echo@2"], max_tokens=60))["answers"]
        assert old["message"] == before["answers"][1]["message"]
        assert new["message"] == echo["message"]
        assert (old["model"], new["model"]) == ("echo@1", "echo@2")
    finally:
        (adapters_root / "echo" / "adapters.safetensors").write_bytes(tensors)
        await service.client.post("/v1/adapters", json={"id": "echo", "replace": True})


async def test_models_share_memory_or_take_turns_and_never_wait_for_each_other(
    adapters_root: Path, service: Service
) -> None:
    """Each of these comparisons needs all the memory that there is; half of it would be of no use to it."""
    await compare(service, "hello", list(SIZES))
    listed = (await service.client.get("/v1/adapters")).json()["data"]
    room = 2 * max(adapter["bytes"] for adapter in listed)
    async with serving(own_parrot(), adapters_dir=adapters_root, adapter_memory_bytes=room) as small:
        pairs = [["echo", "loud"], ["loud", "other"], ["other", "echo"]] * 2
        answers = await asyncio.gather(*(compare(small, "hello", pair) for pair in pairs))
        assert [answer["models"] for answer in answers] == pairs
        reply = await small.client.post(COMPARE, json=body("hello", list(SIZES)))
        assert (reply.status_code, reply.json()["error"]["code"]) == (507, "adapter_memory_exceeded")
        await idle(small)
        assert registry_of(small).in_flight == 0


async def test_a_fuse_waits_for_it_and_it_for_the_fuse(adapters_root: Path) -> None:
    async with serving(own_parrot(), adapters_dir=adapters_root) as service:  # which stays fused
        await compare(service, "hello", ["parrot", "echo"])
        running = asyncio.create_task(compare(service, "sing", ["parrot", "echo"], max_tokens=60))
        await until(service, lambda stats: stats.running_rows)
        fuse = asyncio.create_task(service.client.post("/v1/adapters/echo/fuse", json={}))
        await until(service, lambda stats: stats.completion_tokens > 30)
        later = asyncio.create_task(compare(service, "hello", ["parrot", "echo"]))
        apart, fused = (await running)["answers"], (await later)["answers"]
        assert (await fuse).status_code == 200
        assert abs(apart[1]["mean_differences"][0]) > 0.01
        assert fused[0]["mean_logprobs"] == pytest.approx(fused[1]["mean_logprobs"], abs=1e-4)
        assert fused[0]["mean_differences"] == pytest.approx([0, 0], abs=1e-4)


def is_full(engine: Engine) -> bool:
    """Whether not even one row is left, for which nothing need be computed yet."""
    try:
        engine.check_room(1)
    except EngineOverloadedError:
        return True
    return False


async def test_a_full_server_is_a_503_and_a_running_comparison_is_scored_all_the_same(
    parrot: LoadedModel,
) -> None:
    async with serving(parrot, max_waiting=0) as service:
        held = threading.Event()
        hold = asyncio.create_task(service.engine.container.perform(lambda context: held.wait(60)))
        tasks = [
            asyncio.create_task(compare(service, "sing", ["parrot", "default"], max_tokens=40))
            for _ in range(4)
        ]
        for _ in range(6000):
            if is_full(service.engine):
                break
            await asyncio.sleep(0.01)
        reply = await service.client.post(COMPARE, json=body("sing", ["parrot", "default"]))
        assert reply.status_code == 503
        held.set()
        assert await hold
        for answer in await asyncio.gather(*tasks):
            assert [len(one["tokens"]) for one in answer["answers"]] == [40, 40]


async def test_stopping_the_server_ends_it_with_an_error(parrot: LoadedModel) -> None:
    async with serving(parrot) as service:
        visitor = Visitor(
            service.app,
            COMPARE,
            json.dumps(body("sing", ["parrot", "default"], max_tokens=450, stream=True)).encode(),
        )
        visit = asyncio.create_task(visitor.visit())
        await until(service, lambda stats: stats.running_rows)
    await asyncio.wait_for(visit, 60)
    text = b"".join([visitor.messages.get_nowait().get("body", b"") for _ in range(visitor.messages.qsize())])
    assert b"[DONE]" not in text
    assert b'"error"' in text


async def test_what_a_stop_string_took_is_not_in_the_mean(service: Service) -> None:
    answers = (await compare(service, "#", ["parrot", "echo"], stop="2"))["answers"]
    for answer in answers:
        assert answer["message"]["content"] == "% "
        assert [token["token"] for token in answer["tokens"]] == ["%", " "]
