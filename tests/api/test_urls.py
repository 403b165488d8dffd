"""URLs and methods as clients get them slightly wrong: served where nothing else can be meant, else told."""

from __future__ import annotations

import gzip
import json

import pytest

from server.engine.model import LoadedModel
from tests.api.serving import CHAT, COMPLETIONS, Service, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

BODY = {"messages": [{"role": "user", "content": "hello"}]}
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/parrot", "/v1/adapters"]
)
async def test_head_is_get_without_its_body(service: Service, path: str) -> None:
    got, head = await service.client.get(path), await service.client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert head.headers["content-type"] == got.headers["content-type"]
    if path != "/metrics":  # which counts these requests
        assert head.headers["content-length"] == got.headers["content-length"]


async def test_head_of_what_is_not_there_is_what_get_is(service: Service) -> None:
    for path, status in [("/v1/nothing", 404), ("/v1/models/nobody", 404), (CHAT, 405)]:
        reply = await service.client.head(path)
        assert (reply.status_code, reply.content) == (status, b"")
        assert reply.headers["x-request-id"]


async def test_head_needs_the_key_where_get_does(parrot: LoadedModel) -> None:
    async with serving(parrot, api_key="secret-key-of-32-characters-xxxx") as guarded:
        assert (await guarded.client.head("/health")).status_code == 200
        for path in ("/v1/models", "/v1/models/", "/metrics", "/metrics/"):
            assert (await guarded.client.head(path)).status_code == 401
            assert (await guarded.client.get(path)).status_code == 401


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        (CHAT, "POST, OPTIONS"),
        ("/v1/models", "GET, HEAD, OPTIONS"),
        ("/v1/models/", "GET, HEAD, OPTIONS"),
        ("/v1/adapters", "GET, POST, HEAD, OPTIONS"),
        ("/v1/adapters/a/rollback", "POST, GET, DELETE, HEAD, OPTIONS"),  # an id may end so
    ],
)
async def test_options_says_what_is_allowed(service: Service, path: str, allowed: str) -> None:
    reply = await service.client.options(path)
    assert (reply.status_code, reply.content) == (204, b"")
    assert sorted(reply.headers["allow"].split(", ")) == sorted(allowed.split(", "))


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, "POST"),
        ("GET", f"{COMPLETIONS}/", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("PUT", "/v1/adapters", "GET, HEAD, POST"),
        ("PATCH", "/v1/adapters/a", "DELETE, GET, HEAD"),
        ("MADEUP", "/health", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_told_all_that_are_right(
    service: Service, method: str, path: str, allowed: str
) -> None:
    reply = await service.client.request(method, path)
    assert reply.status_code == 405
    assert sorted(reply.headers["allow"].split(", ")) == allowed.split(", ")
    error = reply.json()["error"]
    assert error["code"] == "method_not_allowed"
    assert reply.headers["allow"] in error["message"]


async def test_slashes_at_the_end_change_nothing(service: Service) -> None:
    models = (await service.client.get("/v1/models")).json()
    for path in ("/v1/models/", "/v1/models//"):
        assert (await service.client.get(path)).json() == models
    assert (await service.client.get("/v1/models/parrot/")).json() == models["data"][0]
    reply = await service.client.post(f"{CHAT}/", json=BODY)
    assert reply.json()["choices"][0]["message"]["content"] == "Hi there!"


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("POST", "/chat/completions", f"POST {CHAT}"),
        ("POST", "/v1/v1/chat/completions", f"POST {CHAT}"),
        ("POST", "/v1/chat/completions/v1/chat/completions", f"POST {CHAT}"),
        ("POST", "//v1/chat/completions", f"POST {CHAT}"),
        ("POST", "/v1//chat//completions", f"POST {CHAT}"),
        ("POST", "/V1/Chat/Completions", f"POST {CHAT}"),
        ("POST", "/openai/deployments/x/chat/completions", f"POST {CHAT}"),
        ("POST", "/api/chat", f"POST {CHAT}"),
        ("GET", "/completion", f"POST {COMPLETIONS}"),
        ("GET", "/models", "GET /v1/models"),
        ("GET", "//v1/models", "GET /v1/models"),
        ("GET", "/v1/v1/models", "GET /v1/models"),
        ("GET", "/api/v0/models", "GET /v1/models"),
        ("GET", "/models/parrot", "GET /v1/models/parrot"),
        ("GET", "/api/tags", "GET /v1/models"),
        ("GET", "/v1/health", "GET /health"),
        ("GET", "/v1/metrics/", "GET /metrics"),
        ("POST", "/load_lora_adapter", "POST /v1/load_lora_adapter"),
    ],
)
async def test_a_url_that_is_not_there_names_the_one_that_was_meant(
    service: Service, method: str, path: str, meant: str
) -> None:
    reply = await service.client.request(method, f"http://localhost:8000{path}", json=BODY)
    assert reply.status_code == 404
    error = reply.json()["error"]
    assert error["code"] == "unknown_url"
    assert error["message"].endswith(f"Did you mean {meant}?")


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/embeddings", "/v1/images/generations", "/" + "x/" * 5000])
async def test_a_url_that_is_like_no_other_has_no_guess(service: Service, path: str) -> None:
    reply = await service.client.get(path)
    assert reply.status_code == 404
    message = reply.json()["error"]["message"]
    assert message.endswith("/openapi.json describes what there is.")
    assert len(message) < 500


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "deflate", "gzip, identity", "x" * 500])
async def test_a_compressed_body_is_told_so(service: Service, encoding: str) -> None:
    body = gzip.compress(json.dumps(BODY).encode())
    reply = await service.client.post(CHAT, content=body, headers={**JSON, "content-encoding": encoding})
    assert reply.status_code == 415
    assert reply.headers["accept-encoding"] == "identity"
    error = reply.json()["error"]
    assert error["code"] == "unsupported_content_encoding"
    assert "Content-Encoding" in error["message"]
    assert encoding[:40] in error["message"]
    assert len(error["message"]) < 300


async def test_an_encoding_that_changes_nothing_is_served(service: Service) -> None:
    for headers in ({"content-encoding": "identity"}, {"content-type": "application/json; charset=UTF-8"}):
        reply = await service.client.post(CHAT, content=json.dumps(BODY), headers={**JSON, **headers})
        assert reply.status_code == 200, reply.text


async def test_a_byte_order_mark_is_not_part_of_a_body(service: Service) -> None:
    reply = await service.client.post(CHAT, content=json.dumps(BODY).encode("utf-8-sig"), headers=JSON)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
async def test_a_body_that_is_not_utf8_is_named(service: Service, encoding: str) -> None:
    body = json.dumps(BODY).encode(encoding)
    reply = await service.client.post(CHAT, content=body, headers=JSON)
    assert reply.status_code == 400
    assert f"it seems to be {encoding.upper()}; encode it as UTF-8" in reply.json()["error"]["message"]
    typed = {"content-type": f"application/json; charset={encoding}"}
    reply = await service.client.post(CHAT, content=body, headers=typed)
    assert reply.status_code == 415
    assert reply.json()["error"]["code"] == "unsupported_charset"
    assert repr(encoding) in reply.json()["error"]["message"]


async def test_latin1_is_not_read_as_utf8(service: Service) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "é"}]}, ensure_ascii=False)
    headers = {"content-type": 'application/json; charset="ISO-8859-1"'}
    reply = await service.client.post(CHAT, content=body.encode("latin-1"), headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (415, "unsupported_charset")


@pytest.mark.parametrize(
    "content_type", [None, "text/plain;charset=UTF-8", "application/x-www-form-urlencoded"]
)
async def test_a_wrong_content_type_is_named_beside_the_right_one(
    service: Service, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    reply = await service.client.post(CHAT, content=json.dumps(BODY).encode(), headers=headers)
    assert reply.status_code == 400
    message = reply.json()["error"]["message"]
    assert "'Content-Type: application/json'" in message
    assert ("there is none" if content_type is None else repr(content_type)) in message
