"""Who is let in: the API key on every route, hosts, origins, CORS, request ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from starlette.routing import BaseRoute, Route

from server.engine.model import LoadedModel
from tests.api.serving import CHAT, Service, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = "a-key-for-tests"
OPEN = {"/health", "/ready"}
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def routes(found: Sequence[BaseRoute]) -> Iterator[Route]:
    """Every route of the application, however its routers are nested."""
    for route in found:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from routes(inner.routes)
        elif isinstance(route, Route):
            yield route
        else:
            raise AssertionError(f"a route of an unknown kind, which nobody has guarded: {route!r}")


def paths(found: Sequence[BaseRoute]) -> Iterator[tuple[str, str]]:
    """Every (method, path) that the application answers."""
    for route in routes(found):
        for method in route.methods or ():
            yield method, route.path


async def test_every_route_but_the_open_ones_asks_for_the_key(parrot: LoadedModel) -> None:
    async with serving(parrot, api_key=KEY) as service:
        walked = set(paths(service.app.routes))
        assert {path for _, path in walked} >= {*OPEN, CHAT, "/v1/completions", "/v1/models", "/v1/adapters"}
        assert "/metrics" in {path for _, path in walked}
        for method, path in sorted(walked):
            url = path.replace("{id:path}", "x").replace("{name:path}", "x")
            assert "{" not in url
            reply = await service.client.request(method, url, json={})
            if path in OPEN:
                assert reply.status_code in (200, 503), (method, path)
            else:
                assert reply.status_code == 401, (method, path)
                assert reply.headers["www-authenticate"] == "Bearer"
                assert reply.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"authorization": f"bearer {KEY}"}, 200),
        ({"x-api-key": KEY}, 200),
        ({"authorization": f"Bearer {KEY}x"}, 401),
        ({"authorization": f"Basic {KEY}"}, 401),
        ({"authorization": KEY}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "ä".encode().decode("latin-1")}, 401),
    ],
)
async def test_the_key(parrot: LoadedModel, headers: dict[str, str], status: int) -> None:
    encoded = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
    async with serving(parrot, api_key=KEY) as service:
        reply = await service.client.post(CHAT, json=HELLO, headers=encoded)
        assert reply.status_code == status
        assert KEY not in reply.text


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("localhost:8000@evil.example", 403),
        ("127.0.0.1.nip.io", 403),
        ("", 403),
        ("a b", 403),
        ("[::1", 403),
    ],
)
async def test_hosts(service: Service, host: str, status: int) -> None:
    reply = await service.client.post(CHAT, json=HELLO, headers={"host": host})
    assert reply.status_code == status
    if status == 403:
        assert reply.json()["error"]["code"] == "host_not_allowed"
        assert reply.headers["x-request-id"]


async def test_allowed_hosts_may_be_any_or_a_domain(parrot: LoadedModel) -> None:
    for allowed, host, status in [
        (["*"], "any.example", 200),
        (["*.example"], "sub.example", 200),
        (["*.example"], "example", 403),
        (["*.example"], "subexample", 403),
    ]:
        async with serving(parrot, allowed_hosts=allowed) as service:
            reply = await service.client.post(CHAT, json=HELLO, headers={"host": host})
            assert reply.status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8000", 200),
        ("https://localhost:8000", 200),
        ("http://localhost:3000", 403),
        ("http://evil.example", 403),
        ("null", 403),
        ("", 403),
        ("file://", 403),
    ],
)
async def test_origins(service: Service, origin: str, status: int) -> None:
    reply = await service.client.post(CHAT, json=HELLO, headers={"origin": origin})
    assert reply.status_code == status
    assert "access-control-allow-origin" not in reply.headers
    if status == 403:
        assert reply.json()["error"]["code"] == "origin_not_allowed"


async def test_a_default_port_may_be_left_out(service: Service) -> None:
    for host, origin in [("localhost", "http://localhost:80"), ("localhost:443", "https://localhost")]:
        reply = await service.client.post(CHAT, json=HELLO, headers={"host": host, "origin": origin})
        assert reply.status_code == 200


async def test_a_public_page_may_reach_this_private_server_if_it_is_allowed(parrot: LoadedModel) -> None:
    asked = {"access-control-request-method": "POST", "access-control-request-private-network": "true"}
    async with serving(parrot, cors_origins=["https://Chat.example/"]) as service:
        reply = await service.client.options(CHAT, headers={"origin": "https://chat.example", **asked})
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-private-network"] == "true"
        assert reply.headers["access-control-allow-origin"] == "https://chat.example"
        reply = await service.client.options(CHAT, headers={"origin": "https://evil.example", **asked})
        assert reply.status_code == 403
        assert "access-control-allow-private-network" not in reply.headers


async def test_cors_for_configured_origins_alone(parrot: LoadedModel) -> None:
    origin = "https://chat.example"
    async with serving(parrot, cors_origins=[origin]) as service:
        preflight = await service.client.options(
            CHAT,
            headers={
                "origin": origin,
                "access-control-request-method": "POST",
                "access-control-request-headers": "content-type,x-stainless-os",
            },
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == origin
        for body, status in [(HELLO, 200), ({}, 400)]:
            reply = await service.client.post(CHAT, json=body, headers={"origin": origin})
            assert reply.status_code == status
            assert reply.headers["access-control-allow-origin"] == origin
        reply = await service.client.post(CHAT, json=HELLO, headers={"origin": "https://evil.example"})
        assert reply.status_code == 403
        assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1.2_3", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("é", False), ("", False)],
)
async def test_request_ids(service: Service, given: str, kept: bool) -> None:
    for path, body in [(CHAT, HELLO), (CHAT, {}), ("/nothing", {})]:
        reply = await service.client.post(path, json=body, headers={b"x-request-id": given.encode("latin-1")})
        assert (reply.headers["x-request-id"] == given) is kept
        assert reply.headers["x-request-id"]


async def test_streams_bear_a_request_id(service: Service) -> None:
    reply = await service.client.post(CHAT, json={**HELLO, "stream": True}, headers={"x-request-id": "mine"})
    assert reply.headers["x-request-id"] == "mine"
    assert reply.headers["cache-control"] == "no-cache"


async def test_the_document_describes_the_endpoints_and_errors(service: Service) -> None:
    document = (await service.client.get("/openapi.json")).json()
    operation = document["paths"][CHAT]["post"]
    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("ChatRequest")
    assert operation["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "ErrorBody"
    )
    assert operation["security"]
    assert "422" not in operation["responses"]
    error = document["components"]["schemas"]["ErrorObject"]
    assert set(error["required"]) == {"message", "type", "param", "code"}


async def test_no_viewer_of_the_document_is_served(service: Service) -> None:
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert (await service.client.get(path)).status_code == 404
