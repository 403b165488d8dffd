"""Numbers that are not finite never leave the server: an error in the contract's shape, or finite JSON."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from server.engine.model import LoadedModel
from tests.api.serving import CHAT, COMPLETIONS, Service, serving
from tests.models import adapter_tensors, adapter_values, write_adapter

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
EXTREMES = [5e-324, 1e-300, 1e-38, 1e-9, 0.01, 0.5, 1.0, 2.0, 100.0, 1e9, 1e38, 1e300, 1.7e308]


@pytest.fixture(scope="module")
def root(parrot: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for name, size, key in (("mild", 0.01, "self_attn.q_proj"), ("huge", 1e30, "lm_head")):
        values = adapter_values(keys=[key], scale=1.0)
        tensors = adapter_tensors(parrot.model, values)
        if name == "huge":
            tensors = {each: mx.full(tensor.shape, size) for each, tensor in tensors.items()}
        write_adapter(folder / name, values, tensors)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(parrot: LoadedModel, root: Path) -> AsyncIterator[Service]:
    async with serving(parrot, adapters_dir=root, default_max_tokens=8) as started:
        yield started


def require_finite(value: Any) -> None:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            require_finite(each)
    assert not isinstance(value, float) or math.isfinite(value)


def strictly(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise AssertionError(f"not JSON: {constant}")

    found = json.loads(text, parse_constant=refuse)
    require_finite(found)
    return found


def require_not_finite_error(body: Any) -> None:
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("server_error", "logits_not_finite")
    assert "'huge'" in error["message"]
    assert "NaN or infinite" in error["message"]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}, {"seed": 1}])
async def test_logits_that_are_not_finite_are_an_error_and_no_text(
    service: Service, fields: dict[str, Any]
) -> None:
    with capture_logs() as logs:
        reply = await service.client.post(CHAT, json={"model": "huge", **HELLO, **fields})
    assert reply.status_code == 500
    require_not_finite_error(strictly(reply.text))
    assert reply.headers["x-should-retry"] == "false"
    (log,) = [entry for entry in logs if entry["event"] == "logits are not finite"]
    assert (log["model"], log["step"]) == ("huge", 1)
    assert (await service.chat("hello"))["choices"][0]["message"]["content"] == "Hi there!"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(("path", "body"), [(CHAT, HELLO), (COMPLETIONS, {"prompt": "hello"})])
async def test_in_a_stream_it_is_an_event_without_done(
    service: Service, path: str, body: dict[str, Any]
) -> None:
    *before, last = await service.events(path, model="huge", **body)
    require_not_finite_error(last)
    assert not any(choice.get("finish_reason") for event in before for choice in event["choices"])


@pytest.mark.asyncio(loop_scope="module")
async def test_a_comparison_with_it_is_an_error(service: Service) -> None:
    reply = await service.client.post("/v1/compare", json={"models": ["parrot", "huge"], **HELLO})
    assert reply.status_code == 500
    require_not_finite_error(strictly(reply.text))


@pytest.mark.asyncio(loop_scope="module")
async def test_a_fusion_that_is_not_finite_is_refused_and_changes_nothing(service: Service) -> None:
    for body in ({}, {"precision": "keep"}, {"weight": 0.5}):
        reply = await service.client.post("/v1/adapters/huge/fuse", json={"unload_others": True, **body})
        assert reply.status_code == 422, reply.text
        assert strictly(reply.text)["error"]["code"] == "adapter_invalid"
        found = await service.client.get("/v1/adapters/huge")
        assert found.json()["state"] == "ready"
        assert (await service.chat("hello", model="mild"))["model"] == "mild"
    events = await service.client.post("/v1/adapters/huge/fuse", json={"unload_others": True, "stream": True})
    assert events.status_code in (200, 422)
    assert "[DONE]" not in events.text
    metrics = (await service.client.get("/metrics")).text
    assert "graft_base_fused 0.0" in metrics
    assert "NaN" not in metrics


@pytest.mark.asyncio(loop_scope="module")
async def test_the_smallest_repetition_penalties_are_refused_by_name(service: Service) -> None:
    for penalty in (5e-324, 1e-300, 0.009):
        body = {**HELLO, "repetition_penalty": penalty, "logprobs": True}
        reply = await service.client.post(CHAT, json=body)
        assert (reply.status_code, strictly(reply.text)["error"]["param"]) == (400, "repetition_penalty")
    assert (await service.chat("hello", repetition_penalty=0.01, logprobs=True))["choices"]


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("mild/fuse", {"weight": NAN}, None),
        ("mild/fuse", {"weight": 1e300}, "weight"),
        ("mild/fuse", {"adapters": [{"id": "huge", "weight": -INFINITY}]}, None),
        ("", {"id": "b", "blend": [{"id": "mild", "weight": 1e300}]}, "blend[0].weight"),
        ("", {"id": "b", "blend": [{"id": "mild", "weight": NAN}]}, None),
        ("", {"id": "b", "blend": [{"id": "mild"}], "method": "ties", "density": INFINITY}, None),
        ("", {"id": "b", "blend": [{"id": "mild"}], "method": "ties", "density": -1e300}, "density"),
    ],
)
async def test_management_refuses_numbers_out_of_range_by_name(
    service: Service, path: str, body: dict[str, Any], param: str | None
) -> None:
    reply = await service.client.post(  # NaN and Infinity are no JSON, and so no field is at fault
        f"/v1/adapters/{path}".rstrip("/"),
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    error = strictly(reply.text)["error"]
    assert (reply.status_code, error["param"]) == (400, param)
    assert (await service.client.get("/v1/adapters/b")).status_code == 404


def signed(values: list[float]) -> st.SearchStrategy[float]:
    return st.one_of(st.sampled_from([0.0, *values, *(-value for value in values)]), st.floats())


NUMBERS = st.dictionaries(
    st.sampled_from(
        [
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "bias",
            "weight",
        ]
    ),
    signed(EXTREMES),
    min_size=1,
    max_size=4,
)


@pytest.mark.asyncio(loop_scope="module")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(numbers=NUMBERS, path=st.sampled_from([CHAT, COMPLETIONS, "/v1/compare"]), streamed=st.booleans())
async def test_every_number_is_refused_by_name_or_gives_a_finite_answer(
    service: Service, numbers: dict[str, float], path: str, streamed: bool
) -> None:
    fields: dict[str, Any] = {"max_tokens": 3, "seed": 1, "stream": streamed, **numbers}
    bias, weight = fields.pop("bias", None), fields.pop("weight", None)
    if bias is not None:
        fields["logit_bias"] = {"1": bias, "40": -bias}
    if path == "/v1/compare":
        fields |= {"models": ["parrot", "mild"], **HELLO}
    elif path == CHAT:
        fields |= {"logprobs": True, "top_logprobs": 3, **HELLO}
    else:
        fields |= {"logprobs": 3, "prompt": "hello"}
    if weight is not None and path != "/v1/compare":
        fields["adapters"] = [{"id": "mild", "weight": weight}]
    reply = await service.client.post(
        path, content=json.dumps(fields), headers={"content-type": "application/json"}
    )
    if reply.status_code == 400:
        error = strictly(reply.text)["error"]
        assert error["param"] or "NaN" in json.dumps(fields) or "Infinity" in json.dumps(fields)
        return
    assert reply.status_code == 200, reply.text
    if not streamed:
        strictly(reply.text)
        return
    *datas, done = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert done == "[DONE]"
    assert not any("error" in strictly(data) for data in datas)
