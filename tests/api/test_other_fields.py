"""Fields that no wire model has: those that name adapters, other servers' parameters, and misspelt ones."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.api.asking import BODIES, CALLS, answered, refused, said, watched_service
from tests.api.serving import CHAT, COMPLETIONS, Service
from tests.api.test_compare import COMPARE

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with watched_service(tmp_path_factory.mktemp("adapters")) as started:
        yield started


# Adapters under other names

NAMING: list[dict[str, Any]] = [
    {"lora": [{"id": 0, "scale": 1.0}]},
    {"lora": 0},
    {"lora_adapters": [{"id": 0, "scale": 1.0}]},
    {"lora_request": {"lora_name": "echo", "lora_int_id": 1}},
    {"lora_name": "echo"},
    {"lora_id": "echo"},
    {"loraPath": "echo"},
    {"LoRA": "echo"},
    {"lora_modules": ["echo"]},
    {"lora_weights": {"echo": 1}},
    {"adapter": "echo"},
    {"adapter_name": "echo"},
    {"adapterId": "echo"},
    {"adapter-id": "echo"},
    {"adapter_ids": ["echo"]},
    {"active_adapter": "echo"},
    {"peft_model": "echo"},
    {"merged_adapters": {"ids": ["echo"], "weights": [1.0]}},
    {"adapter_parameters": {"adapter_ids": ["echo"], "weights": [1.0]}},
    {"adapter_source": "local"},
    {"models": ["echo"]},
    {"model_name": "echo"},
    {"Model": "echo"},
    {"extra_body": {"lora_path": "echo"}},
    {"parameters": {"adapter_id": "echo"}},
    {"options": {"adapter": "echo"}},
    {"sampling_params": {"lora": "echo"}},
    {"anything": {"lora_path": "echo"}},
    {"anything": {"within": {"adapterName": "echo"}}},
    {"lora_path": ["echo"]},
    {"adapter_id": {"id": "echo"}},
    {"adapters": ["echo"]},
    {"adapters": [{"name": "echo"}]},
    {"adapters": [{"id": "echo", "scale": 0.5}]},
    {"adapters": [{"id": "echo", "wieght": 0.5}]},
    {"lora_path": "echo", "adapters": [{"id": "loud"}]},
    {"lora_path": "echo", "model": "loud"},
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("fields", NAMING, ids=json.dumps)
async def test_the_base_never_answers_for_an_adapter(
    service: Service, path: str, fields: dict[str, Any]
) -> None:
    error = await refused(service, fields, path)
    name = next(iter(fields))
    assert error["param"].partition("[")[0].partition(".")[0] == name
    assert name in error["message"]


@pytest.mark.parametrize("name", ["lora_path", "adapter_id", "adapters"])
async def test_an_adapter_that_is_not_there_is_a_404_that_names_the_field(
    service: Service, name: str
) -> None:
    reply = await service.client.post(CHAT, json=BODIES[CHAT] | {name: "nobody"})
    assert reply.status_code == 404
    assert reply.json()["error"]["param"] == name


async def test_an_adapter_in_a_message_is_refused(service: Service) -> None:
    assert (await refused(service, said(lora="echo")))["param"] == "messages[0].lora"


@pytest.mark.parametrize("path", CALLS)
async def test_adapters_in_headers_and_queries_are_refused(service: Service, path: str) -> None:
    header, query = {"X-Amzn-SageMaker-Adapter-Identifier": "echo"}, {"lora_path": "echo"}
    for headers, params in ((header, {}), ({}, query)):
        reply = await service.client.post(path, json=BODIES[path], headers=headers, params=params)
        assert reply.status_code == 400
        assert "adapter" in reply.json()["error"]["message"]
    version = {"api-version": "2024-06-01"}  # Azure's clients always send it
    plain = await service.client.post(path, json=BODIES[path], params=version if path != COMPARE else {})
    assert plain.status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_path": None},
        {"lora_path": ""},
        {"lora_path": []},
        {"adapter_id": ""},
        {"adapters": ""},
        {"adapters": []},
        {"lora": []},
        {"lora_request": None},
        {"use_lora": False},
        {"adapter_names": []},
        {"anything": {"within": {"lora": None, "adapter": ""}}},
        {"extra_body": {}},
        {"exploration": "on"},
        {"pandora": 1},
    ],
    ids=json.dumps,
)
async def test_naming_no_adapter_is_the_base(service: Service, fields: dict[str, Any]) -> None:
    assert (await answered(service, fields)).weights == []


# Other servers' parameters, and misspelt ones


async def test_what_pages_and_clients_always_send_is_accepted(service: Service) -> None:
    llama_cpp_page = {
        "stream": True, "return_progress": True, "reasoning_format": "auto", "temperature": 0.8,
        "max_tokens": -1, "dynatemp_range": 0, "dynatemp_exponent": 1, "top_k": 40, "top_p": 0.95,
        "min_p": 0.05, "xtc_probability": 0, "xtc_threshold": 0.1, "typ_p": 1, "repeat_last_n": 64,
        "repeat_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "dry_multiplier": 0,
        "dry_base": 1.75,
        "dry_allowed_length": 2, "dry_penalty_last_n": -1, "samplers": "edkypmxt", "backend_sampling": False,
        "timings_per_token": True, "cache_prompt": True, "reasoning_control": True,
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    lm_studio = {
        "logit_bias": [],
        "ttl": 300,
        "draft_model": "",
        "repeat_penalty": 1.0,
        "seed": -1,
        "max_tokens": -1,
    }
    vllm = {
        "best_of": 1, "use_beam_search": False, "length_penalty": 1.0, "ignore_eos": False, "min_tokens": 0,
        "skip_special_tokens": True, "spaces_between_special_tokens": True, "echo": False, "priority": 0,
        "add_special_tokens": False, "stop_token_ids": [], "include_stop_str_in_output": False,
    }  # fmt: skip
    openai = {"user": "u", "metadata": {"a": "b"}, "store": False, "tools": [], "tool_choice": "auto",
              "parallel_tool_calls": True, "prompt_cache_key": "k", "safety_identifier": "s"}  # fmt: skip
    strangers = {
        "chat_id": "1",
        "user_id": 2,
        "mode": "x",
        "tags": [],
        "session": "s",
        "trace_id": "t",
        "id": 1,
    }
    for fields in (llama_cpp_page, lm_studio, vllm, openai, strangers):
        await answered(service, fields)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"repeat_penalty": 1.8}, "'repeat_penalty' (use 'repetition_penalty'"),
        ({"num_predict": 5}, "'num_predict' (use 'max_tokens')"),
        ({"mirostat": 2, "mirostat_tau": 5}, "'mirostat' (only 0 is accepted), 'mirostat_tau'"),
        ({"repeat_last_n": 64, "presence_penalty": 0.5}, "'repeat_last_n'"),
        ({"repetition_context_size": 20, "repetition_penalty": 1.1}, "'repetition_context_size'"),
        ({"best_of": 2}, "'best_of'"),
        ({"n": 2, "best_of": 1}, "'best_of'"),
        ({"mirostat": True}, "'mirostat'"),
        ({"samplers": ["top_k"]}, "'samplers'"),
        ({"cache_prompt": False}, "'cache_prompt'"),
        (
            {"tool_choice": "auto", "tools": [{}], "parallel_tool_calls": True},
            "'tools', 'parallel_tool_calls'",
        ),
        ({"prompt": "greek"}, "'prompt' (use 'messages'"),
        ({"id_slot": 2}, "'id_slot' (only -1 is accepted)"),
        ({"do_sample": False}, "'do_sample' (use 'temperature': 0"),
    ],
    ids=str,
)
async def test_other_servers_parameters_are_refused_by_name(
    service: Service, fields: dict[str, Any], named: str
) -> None:
    error = await refused(service, fields)
    assert error["code"] == "unsupported_parameter"
    assert f"Not supported by this server: {named}" in error["message"]


@pytest.mark.parametrize(
    ("wrong", "right"),
    {
        "temprature": "temperature", "temperatur": "temperature", "tempreature": "temperature",
        "max_token": "max_tokens", "maxTokens": "max_tokens", "max-tokens": "max_tokens",
        "maxCompletionTokens": "max_completion_tokens", "top-p": "top_p", "topP": "top_p", "TOP_K": "top_k",
        "Stream": "stream", "strem": "stream", "steram": "stream", "stream_option": "stream_options",
        "modle": "model", "message": "messages", "presense_penalty": "presence_penalty",
        "repitition_penalty": "repetition_penalty", "logit_biases": "logit_bias", "sotp": "stop",
        "toplogprobs": "top_logprobs", "repeat_penality": "repeat_penalty", "n_predic": "n_predict",
    }.items(),
)  # fmt: skip
async def test_misspelt_parameters_are_told_their_right_name(
    service: Service, wrong: str, right: str
) -> None:
    error = await refused(service, {wrong: 0.5})
    assert (error["code"], error["param"]) == ("unknown_parameter", wrong)
    assert error["message"] == f"'{wrong}' is not a field of this call. Did you mean '{right}'?"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        (said(content=[{"type": "text", "text": "a", "txet": "b"}]), "messages[0].content[0].txet"),
        (said(reasoning_contents="so"), "messages[0].reasoning_contents"),
        (said(prefix=True), "messages[0].prefix"),
        ({"chat_template_kwargs": {"enable_thinkin": True}}, "chat_template_kwargs.enable_thinkin"),
        ({"chat_template_kwargs": {"custom": True}}, "chat_template_kwargs.custom"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
async def test_fields_within_fields_are_named(service: Service, fields: dict[str, Any], param: str) -> None:
    assert (await refused(service, fields))["param"] == param


async def test_a_comparison_is_ours_alone(service: Service) -> None:
    for fields, message in (
        ({"whatever": 5}, "'whatever' is not a field of this call."),
        ({"temprature": 1}, "'temprature' is not a field of this call. Did you mean 'temperature'?"),
    ):
        assert (await refused(service, fields, COMPARE))["message"] == message


async def test_very_many_unknown_fields_cost_nothing(service: Service) -> None:
    error = await refused(service, {f"temperatur{index}": 1 for index in range(50_000)})
    assert "at most 32" in error["message"]
    assert len((await refused(service, {"lora" + "x" * 100_000: 1}))["message"]) < 300
