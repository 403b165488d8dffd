"""The HTTP contract of adapters, models, vLLM's names and health, over the real application."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import mlx_lm
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.adapters.service import AdapterService
from tests.adapters.support import BASE, Site, read_model, site
from tests.models import adapter_tensors, adapter_values, make_adapter, write_adapter

FIELDS = {
    "id", "object", "created", "base", "path", "format", "type", "rank", "scale", "modules", "bytes",
    "digest", "version", "state", "resident", "pinned", "active", "in_flight", "requests", "last_used",
    "load_seconds", "checkpoints", "versions", "blend",
}  # fmt: skip


async def load(tiny_site: Site, name: str, status: int = 201, **fields: Any) -> Any:
    return await tiny_site.call("POST", "/v1/adapters", {"id": name, **fields}, status=status)


async def test_the_whole_life(tiny_site: Site) -> None:
    base = await tiny_site.says(None)
    listing = await tiny_site.call("GET", "/v1/adapters")
    assert listing["available"] == ["a", "b", "broken", "d"]
    assert listing["memory_limit_bytes"] > 0
    assert {**listing, "available": [], "memory_limit_bytes": 1} == {
        "object": "list", "data": [], "active": None, "resident_bytes": 0, "memory_limit_bytes": 1,
        "available": [], "checkpoints": {},
    }  # fmt: skip

    adapter = await load(tiny_site, "a")
    assert set(adapter) == {*FIELDS, "report"}
    told = ("id", "object", "base", "path", "format", "type", "rank", "scale", "modules", "version", "state")
    assert [adapter[name] for name in told] == [
        "a",
        "adapter",
        BASE,
        "a",
        "mlx",
        "lora",
        4,
        2.0,
        9,
        1,
        "ready",
    ]
    assert (adapter["pinned"], adapter["active"], adapter["in_flight"], adapter["requests"]) == (
        False,
        False,
        0,
        0,
    )
    assert adapter["last_used"] is None
    assert adapter["digest"].startswith("sha256:")
    assert adapter["load_seconds"] > 0
    assert (await load(tiny_site, "d", pinned=True, path="./d"))["type"] == "dora"
    says = {name: await tiny_site.says(name) for name in ("a", "b", "d", f"{BASE}:a")}
    assert says["a"] == says.pop(f"{BASE}:a")
    assert len({base, *says.values()}) == 4

    swapped = await tiny_site.call("PUT", "/v1/adapters/active", {"id": "a"})
    assert set(swapped) == {"active", "previous", "swap_seconds"}
    assert (swapped["active"], swapped["previous"]) == ("a", None)
    for default in (None, "", "default"):
        assert await tiny_site.says(default) == says["a"]
    assert await tiny_site.says(BASE) == base
    one = await tiny_site.call("GET", "/v1/adapters/a")
    assert (one["active"], one["requests"]) == (True, 5)
    assert one["last_used"] >= one["created"]
    listing = await tiny_site.call("GET", "/v1/adapters")
    assert [each["id"] for each in listing["data"]] == ["a", "d", "b"]
    assert (listing["active"], listing["available"]) == ("a", ["broken"])
    assert listing["resident_bytes"] >= sum(each["bytes"] for each in listing["data"]) > 0

    make_adapter(tiny_site.root / "a", read_model(tiny_site.model), seed=42)
    again = await load(tiny_site, "a", status=200, replace=True)
    assert (again["version"], again["digest"] != one["digest"], again["active"]) == (2, True, True)
    assert await tiny_site.says("a") not in says.values()

    gone = await tiny_site.call("DELETE", "/v1/adapters/a?timeout_seconds=3")
    assert set(gone) == {*FIELDS, "freed_bytes"}
    assert gone["id"] == "a"
    assert gone["freed_bytes"] >= 0
    assert await tiny_site.says(None) == base
    error = (await tiny_site.chat("a", status=404))["error"]
    assert error["code"] == "model_not_found"
    assert "'tiny', 'd', 'b'" in error["message"]
    await tiny_site.refused("GET", "/v1/adapters/a", None, 404, "adapter_not_found")
    assert "a" in (await tiny_site.call("GET", "/v1/adapters"))["available"]
    swapped = await tiny_site.call("PUT", "/v1/adapters/active", {"id": "b"})
    swapped = await tiny_site.call("PUT", "/v1/adapters/active", {"id": None, "unload_previous": True})
    assert (swapped["active"], swapped["previous"]) == (None, "b")
    await tiny_site.call("DELETE", "/v1/adapters/d")
    listing = await tiny_site.call("GET", "/v1/adapters")
    assert (listing["data"], listing["resident_bytes"]) == ([], 0)
    assert await tiny_site.says(BASE) == base


async def test_fuse_and_unfuse(tiny_site: Site, tmp_path: Path) -> None:
    base, adapted = await tiny_site.says(BASE), await tiny_site.says("a")
    await load(tiny_site, "b")
    fuse = "/v1/adapters/a/fuse"
    error = await tiny_site.refused("POST", fuse, None, 409, "adapters_loaded")
    assert error["details"] == {"adapters": ["b"]}

    saved = await tiny_site.call("POST", fuse, {"save_to": "merged"})
    assert saved["saved_to"] == "merged"
    assert mlx_lm.load(str(tmp_path / "models" / "merged"))
    await tiny_site.refused("POST", fuse, {"save_to": "merged"}, 409, "model_exists")
    for name in ("../merged", "/tmp/x", ".x", "a/b"):
        await tiny_site.refused("POST", fuse, {"save_to": name}, 403, "path_not_allowed")
    assert os.listdir(tmp_path / "models") == ["merged"]

    report = await tiny_site.call("POST", fuse, {"precision": "auto", "unload_others": True})
    assert (report["id"], report["modules"], report["precision"]) == ("a", 9, {"dense": 9})
    assert 0 <= report["error_mean"] <= report["error_worst"] < 1e-3
    assert (report["worst_module"] is None) == (report["error_worst"] == 0)
    assert report["seconds"] > 0
    assert report["saved_to"] is None
    assert (await tiny_site.call("GET", "/v1/adapters/a"))["state"] == "fused"
    models = (await tiny_site.call("GET", "/v1/models"))["data"]
    assert [(model["id"], model.get("fused"), model.get("state")) for model in models] == [
        (BASE, "a", None),
        ("a", None, "fused"),
    ]
    assert await tiny_site.says(BASE) == await tiny_site.says("a") == adapted
    for method, path, body in (
        ("POST", "/v1/adapters", {"id": "b"}),
        ("POST", "/v1/adapters", {"id": "a", "replace": True}),
        ("DELETE", "/v1/adapters/a", None),
        ("PUT", "/v1/adapters/active", {"id": "b"}),
        ("POST", fuse, None),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "b", "lora_path": "b"}),
    ):
        await tiny_site.refused(method, path, body, 409, "base_is_fused")
    for name in ("b", "d"):  # one was unloaded, the other would be loaded on demand
        assert (await tiny_site.chat(name, status=409))["error"]["code"] == "base_is_fused"
    assert (await tiny_site.chat("nowhere", status=404))["error"]["code"] == "model_not_found"

    assert (await tiny_site.call("DELETE", fuse))["state"] == "ready"
    await tiny_site.refused("DELETE", fuse, None, 409, "adapter_not_fused")
    await tiny_site.refused("DELETE", "/v1/adapters/b/fuse", None, 404, "adapter_not_found")
    await tiny_site.refused("POST", "/v1/adapters/b/fuse", None, 404, "adapter_not_found")
    assert (await tiny_site.says(BASE), await tiny_site.says("a")) == (base, adapted)


REFUSED_LOADS: list[tuple[Any, int, str | None]] = [
    ({"id": "nowhere"}, 404, "adapter_not_found"),
    ({"id": "x", "path": "nowhere"}, 404, "adapter_not_found"),
    ({"id": "x", "path": "../x"}, 403, "path_not_allowed"),
    ({"id": "x", "path": "/etc"}, 403, "path_not_allowed"),
    ({"id": "x", "path": "escape"}, 403, "path_not_allowed"),
    ({"id": "x", "path": "."}, 403, "path_not_allowed"),
    ({"id": "x", "path": "a\0"}, 403, "path_not_allowed"),
    ({"id": "a"}, 409, "adapter_exists"),
    ({"id": "broken"}, 422, "adapter_invalid"),
    ({"id": "../x"}, 400, "invalid_adapter_id"),
    ({"id": BASE}, 400, "invalid_adapter_id"),
    ({"id": "default"}, 400, "invalid_adapter_id"),
    ({"id": "x" * 300}, 400, "invalid_adapter_id"),
    ({"id": "a\nb\r\n"}, 400, "invalid_adapter_id"),
    ({"id": ""}, 400, None),
    ({"id": "x" * 5000}, 400, None),
    ({"id": 7}, 400, None),
    ({"id": "b", "path": ""}, 400, None),
    ({"id": "b", "replace": "yes"}, 400, None),
    ({"id": "b", "pinned": 1}, 400, None),
    ({"id": "b", "actviate": True}, 400, "unknown_parameter"),
    ({}, 400, None),
    ([], 400, None),
    (b"{", 400, None),
    (b'{"id": "b", "x": ' + b"[" * 5000, 400, None),
    (b"\xff", 400, None),
    (b"", 400, None),
]


async def test_a_load_that_is_refused_changes_nothing(tiny_site: Site, tmp_path: Path) -> None:
    (tiny_site.root / "escape").symlink_to(tmp_path)
    await load(tiny_site, "a", activate=True)
    for body, status, code in REFUSED_LOADS:
        error = await tiny_site.refused("POST", "/v1/adapters", body, status, code)
        if status == 422:
            assert "adapters.safetensors: expected a file of this name, there is none" in error["details"]


REFUSED_CALLS: list[tuple[str, str, Any, int, str | None]] = [
    ("GET", "/v1/adapters/nowhere", None, 404, "adapter_not_found"),
    ("GET", "/v1/adapters/active", None, 404, "adapter_not_found"),
    ("GET", f"/v1/adapters/{'x' * 300}", None, 404, "adapter_not_found"),
    ("GET", "/v1/adapters/a%0Ab", None, 404, "unknown_url"),
    ("DELETE", "/v1/adapters/nowhere", None, 404, "adapter_not_found"),
    ("DELETE", "/v1/adapters/b", None, 404, "adapter_not_found"),
    ("DELETE", "/v1/adapters/a?timeout_seconds=-1", None, 400, None),
    ("DELETE", "/v1/adapters/a?timeout_seconds=3601", None, 400, None),
    ("DELETE", "/v1/adapters/a?timeout_seconds=nan", None, 400, None),
    ("DELETE", "/v1/adapters/a?timeout_seconds=inf", None, 400, None),
    ("DELETE", "/v1/adapters/a?timeout_seconds=soon", None, 400, None),
    ("DELETE", "/v1/adapters/a?timeout_second=0", None, 400, "unknown_parameter"),
    ("PUT", "/v1/adapters/active", {"id": "nowhere"}, 404, "adapter_not_found"),
    ("PUT", "/v1/adapters/active", {"id": "../b"}, 400, "invalid_adapter_id"),
    ("PUT", "/v1/adapters/active", {"id": "broken"}, 422, "adapter_invalid"),
    ("PUT", "/v1/adapters/active", {}, 400, None),
    ("PUT", "/v1/adapters/active?unload_previous=true", {"id": None}, 400, "unknown_parameter"),
    ("POST", "/v1/adapters?replace=true", {"id": "a"}, 400, "unknown_parameter"),
    ("POST", "/v1/adapters/a/fuse?unload_others=true", None, 400, "unknown_parameter"),
    ("POST", "/v1/adapters/a/save?format=peft", {"save_to": "x"}, 400, "unknown_parameter"),
    (
        "POST",
        "/v1/load_lora_adapter?load_inplace=true",
        {"lora_name": "b", "lora_path": "b"},
        400,
        "unknown_parameter",
    ),
    ("PUT", "/v1/adapters/active", {"id": "a", "unload_previous": "x"}, 400, None),
    ("POST", "/v1/adapters/nowhere/fuse", None, 404, "adapter_not_found"),
    ("POST", "/v1/adapters/a/fuse", {"precision": "best"}, 400, None),
    ("POST", "/v1/adapters/a/fuse", {"unload_other": True}, 400, "unknown_parameter"),
    ("DELETE", "/v1/adapters/a/fuse", None, 409, "adapter_not_fused"),
    ("PATCH", "/v1/adapters/a", None, 405, "method_not_allowed"),
    ("GET", "/v1/models/nowhere", None, 404, "model_not_found"),
    ("GET", "/v1/models/tiny:", None, 404, "model_not_found"),
    ("GET", "/v1/models/tiny:nowhere", None, 404, "model_not_found"),
    ("GET", "/v1/models/notes", None, 404, "model_not_found"),
    ("GET", "/v1/models/active", None, 404, "model_not_found"),
    ("GET", "/v1/models/%2e%2e", None, 404, "model_not_found"),
]


async def test_a_call_that_is_refused_changes_nothing(tiny_site: Site) -> None:
    await load(tiny_site, "a", activate=True)
    for method, path, body, status, code in REFUSED_CALLS:
        await tiny_site.refused(method, path, body, status, code)


async def test_every_problem_of_an_adapter_is_told(tiny_site: Site) -> None:
    model = read_model(tiny_site.model)
    values = adapter_values()
    tensors = adapter_tensors(model, values)
    names = sorted(tensors)
    tensors[names[0]] = tensors[names[0]] * float("nan")
    tensors["model.layers.0.nothing.lora_a"] = tensors[names[1]]
    del tensors[names[2]]
    write_adapter(tiny_site.root / "bad", values, tensors)
    error = await tiny_site.refused("POST", "/v1/adapters", {"id": "bad"}, 422, "adapter_invalid")
    assert any(names[0] in problem for problem in error["details"])
    write_adapter(
        tiny_site.root / "bad", values, {name: tensors[name] for name in tensors if name != names[0]}
    )
    error = await tiny_site.refused("POST", "/v1/adapters", {"id": "bad"}, 422, "adapter_invalid")
    for name in (names[0], names[2], "model.layers.0.nothing.lora_a"):
        assert any(name in problem for problem in error["details"])
    assert (await tiny_site.chat("bad", status=422))["error"]["code"] == "adapter_invalid"


async def test_a_busy_adapter_is_ready_again(tiny_site: Site) -> None:
    await load(tiny_site, "a")
    pin = await tiny_site.service.resolve("a")
    deleting = asyncio.create_task(tiny_site.client.delete("/v1/adapters/a?timeout_seconds=0.3"))
    while (await tiny_site.call("GET", "/v1/adapters/a"))["state"] != "draining":
        await tiny_site.call("GET", "/v1/adapters")  # takes a turn of the engine, so that others have theirs
        assert not deleting.done()
    await tiny_site.chat("a", status=404)
    models = await tiny_site.call("GET", "/v1/models")
    assert [model["id"] for model in models["data"]] == [BASE, "b", "broken", "d"]
    await tiny_site.refused("GET", "/v1/models/a", None, 404, "model_not_found")
    reply = await deleting
    assert reply.status_code == 409
    assert reply.json()["error"]["code"] == "adapter_busy"
    adapter = await tiny_site.call("GET", "/v1/adapters/a")
    assert (adapter["state"], adapter["in_flight"]) == ("ready", 1)
    await tiny_site.says("a")
    pin.release()
    await tiny_site.call("DELETE", "/v1/adapters/a?timeout_seconds=0")


async def test_blending_over_http(tiny_site: Site) -> None:
    only = await tiny_site.says("a")
    assert await tiny_site.says(None, adapters=[{"id": "a"}]) == only
    assert await tiny_site.says(BASE, adapters=[{"id": "a", "weight": 0.0}]) == await tiny_site.says(BASE)
    blend = [{"id": "a", "weight": 0.7}, {"id": "b", "weight": 0.7}]
    assert await tiny_site.says(None, adapters=blend) == await tiny_site.says(None, adapters=blend[::-1])
    for model, adapters, status in (
        ("a", [{"id": "b"}], 400),
        (None, [{"id": "d"}, {"id": "a"}], 400),
        (None, [{"id": "d", "weight": 0.5}], 400),
        (None, [{"id": "nowhere"}], 404),
    ):
        await tiny_site.chat(model, status=status, adapters=adapters)
    assert tiny_site.service.registry.in_flight == 0


async def test_models(tiny_site: Site) -> None:
    await load(tiny_site, "x", path="a")
    models = await tiny_site.call("GET", "/v1/models")
    assert models["object"] == "list"
    base, adapter, *available = models["data"]
    assert (base["id"], base["object"], base["parent"]) == (BASE, "model", None)
    assert (base["root"], base["max_model_len"]) == (tiny_site.model.name, 4096)
    assert (adapter["id"], adapter["root"], adapter["parent"]) == ("x", "a", BASE)
    assert [model["id"] for model in available] == ["a", "b", "broken", "d"]
    for model in available:
        assert model == {**adapter, "id": model["id"], "root": model["id"]} | {
            "created": model["created"],
            "state": "available",
        }
    assert not any("/" in model["root"] for model in models["data"])
    for model in models["data"]:
        assert await tiny_site.call("GET", f"/v1/models/{model['id']}") == model
    assert await tiny_site.call("GET", f"/v1/models/{BASE}:x") == adapter
    assert [entry.id for entry in tiny_site.service.registry.entries] == ["x"]


async def test_models_by_every_name_that_is_served(tiny_site: Site) -> None:
    base = await tiny_site.call("GET", f"/v1/models/{BASE}")
    assert await tiny_site.call("GET", "/v1/models/default") == base
    assert (await tiny_site.call("GET", f"/v1/models/{BASE}:b"))["state"] == "available"
    await tiny_site.says("b")
    assert (await tiny_site.call("GET", f"/v1/models/{BASE}:b"))["state"] == "ready"
    await tiny_site.call("PUT", "/v1/adapters/active", {"id": "b"})
    active = await tiny_site.call("GET", "/v1/models/default")
    assert (active["id"], active["parent"]) == ("b", BASE)
    assert await tiny_site.call("GET", f"/v1/models/{BASE}") == base
    await tiny_site.call("DELETE", "/v1/adapters/b")
    await tiny_site.chat("b", status=404)  # nothing but a call brings it back
    await tiny_site.refused("GET", "/v1/models/b", None, 404, "model_not_found")
    ids = [model["id"] for model in (await tiny_site.call("GET", "/v1/models"))["data"]]
    assert ids == [BASE, "a", "broken", "d"]


async def test_models_without_loads_on_demand_are_those_that_are_loaded(model_path: Path, root: Path) -> None:
    async with site(model_path, root, load_on_demand=False) as strict:
        await load(strict, "a")
        ids = [model["id"] for model in (await strict.call("GET", "/v1/models"))["data"]]
        assert ids == [BASE, "a"]
        await strict.refused("GET", "/v1/models/b", None, 404, "model_not_found")
        await strict.chat("b", status=404)


async def test_models_while_one_is_fused(tiny_site: Site) -> None:
    await load(tiny_site, "a")
    await tiny_site.call("POST", "/v1/adapters/a/fuse")
    ids = [model["id"] for model in (await tiny_site.call("GET", "/v1/models"))["data"]]
    assert ids == [BASE, "a"]
    await tiny_site.refused("GET", "/v1/models/b", None, 409, "base_is_fused")
    await tiny_site.chat("b", status=409)


async def test_a_base_whose_name_has_slashes_and_colons(model_path: Path, root: Path) -> None:
    async with site(model_path, root, base="org/tiny:4bit") as odd:
        assert (await odd.call("GET", "/v1/models/org/tiny:4bit"))["id"] == "org/tiny:4bit"
        says = await odd.says("a")
        assert await odd.says("org/tiny:4bit:a") == says
        assert (await odd.call("GET", "/v1/models/org/tiny:4bit:a"))["id"] == "a"
        await odd.chat("org/tiny", status=404)


@pytest.mark.parametrize("form", ["org/name", "{root}/a", "org.x/deep_er/na-me"])
async def test_vllms_clients_name_adapters_by_paths(tiny_site: Site, form: str) -> None:
    name = form.format(root=tiny_site.root)
    body = {"lora_name": name, "lora_path": str(tiny_site.root / "a")}
    await tiny_site.call("POST", "/v1/load_lora_adapter", body)
    assert await tiny_site.says(name) == await tiny_site.says(f"{BASE}:{name}") == await tiny_site.says("a")
    assert name in [model["id"] for model in (await tiny_site.call("GET", "/v1/models"))["data"]]
    for url in (name, name.replace("/", "%2F")):
        assert (await tiny_site.call("GET", f"/v1/models/{url}"))["root"] == "a"
        assert (await tiny_site.call("GET", f"/v1/adapters/{url}@1"))["path"] == "a"
    await tiny_site.call("DELETE", "/v1/adapters/a")
    await tiny_site.call("POST", f"/v1/adapters/{name}/fuse")
    assert (await tiny_site.call("DELETE", f"/v1/adapters/{name}/fuse"))["state"] == "ready"
    await tiny_site.call("POST", f"/v1/adapters/{name}/save", {"save_to": "saved"})
    for call, given, status, code in (
        ("save", {"save_to": "org/saved"}, 403, "path_not_allowed"),
        ("rollback", None, 409, "no_previous_version"),
    ):
        reply = await tiny_site.call("POST", f"/v1/adapters/{name}/{call}", given, status=status)
        assert reply["error"]["code"] == code
    await tiny_site.call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
    await tiny_site.chat(name, status=404)


@pytest.mark.parametrize(
    "name",
    ["../a", "a/../b", "a//b", "a/", "/", "./a", "/.", "a/fuse", "org/save", "a b/c", "x" * 300 + "/y"],
)
async def test_paths_that_are_no_names(tiny_site: Site, name: str) -> None:
    body = {"lora_name": name, "lora_path": "a"}
    error = await tiny_site.refused("POST", "/v1/load_lora_adapter", body, 400, None)
    assert error["type"] == "InvalidUserInput"
    await tiny_site.refused("POST", "/v1/adapters", {"id": name, "path": "a"}, 400, "invalid_adapter_id")


async def test_a_path_is_no_folder_to_load_on_demand(tiny_site: Site) -> None:
    make_adapter(tiny_site.root / "org" / "name", read_model(tiny_site.model))
    for name in ("org/name", f"{tiny_site.root}/a"):
        await tiny_site.chat(name, status=404)
        await tiny_site.call("GET", f"/v1/models/{name}", status=404)


async def test_vllms_names(tiny_site: Site) -> None:
    load_path, unload_path = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    body = {"lora_name": "x", "lora_path": "a", "base_model_name": "ignored"}
    assert await tiny_site.call("POST", load_path, body) == "Success: LoRA adapter 'x' added successfully."
    error = (await tiny_site.call("POST", load_path, body, status=400))["error"]
    assert error["type"] == "InvalidUserInput"
    assert error["message"] == (
        "The lora adapter 'x' has already been loaded. If you want to load the adapter in place, set "
        "'load_inplace' to True."
    )
    in_place = {**body, "lora_path": str(tiny_site.root / "b"), "load_inplace": True}
    assert (
        await tiny_site.call("POST", load_path, in_place) == "Success: LoRA adapter 'x' added successfully."
    )
    assert (await tiny_site.call("GET", "/v1/adapters/x"))["version"] == 2
    pinned = {"lora_name": "kept", "lora_path": "a", "pinned": True}
    assert (await tiny_site.call("POST", load_path, pinned)).startswith("Success")
    assert (await tiny_site.call("GET", "/v1/adapters/kept"))["pinned"]
    await tiny_site.call("POST", unload_path, {"lora_name": "kept"})
    for wrong, status, kind in (
        ({}, 400, "InvalidUserInput"),
        ({"lora_name": "y"}, 400, "InvalidUserInput"),
        ({"lora_name": "", "lora_path": "a"}, 400, "InvalidUserInput"),
        ({"lora_name": "y", "lora_path": "broken"}, 400, "InvalidUserInput"),
        ({"lora_name": "../y", "lora_path": "a"}, 400, "InvalidUserInput"),
        ({"lora_name": "y", "lora_path": "nowhere"}, 404, "NotFoundError"),
        ({"lora_name": "y", "lora_path": "/etc"}, 403, "permission_error"),
        ({"lora_name": "y", "lora_path": "../x"}, 403, "permission_error"),
        ({"lora_name": 7, "lora_path": "a"}, 400, "invalid_request_error"),
        ({"lora_name": "y", "lora_path": "a", "load_in_place": True}, 400, "invalid_request_error"),
    ):
        error = (await tiny_site.call("POST", load_path, wrong, status=status))["error"]
        assert error["type"] == kind, wrong
    text = await tiny_site.call("POST", unload_path, {"lora_name": "x", "lora_int_id": 1})
    assert text == "Success: LoRA adapter 'x' removed successfully."
    error = (await tiny_site.call("POST", unload_path, {"lora_name": "x"}, status=404))["error"]
    assert (error["type"], error["message"]) == ("NotFoundError", "The lora adapter 'x' cannot be found.")
    error = (await tiny_site.call("POST", unload_path, {}, status=400))["error"]
    assert error["type"] == "InvalidUserInput"
    assert await tiny_site.ids() == []


async def test_the_memory_limit_is_a_507(model_path: Path, root: Path) -> None:
    async with site(model_path, root, adapter_memory_bytes=1000) as small:
        error = await small.refused("POST", "/v1/adapters", {"id": "a"}, 507, "adapter_memory_exceeded")
        assert error["details"]["limit_bytes"] == 1000
        assert (await small.chat("a", status=507))["error"]["code"] == "adapter_memory_exceeded"


async def test_health_and_version(tiny_site: Site) -> None:
    assert await tiny_site.call("GET", "/health") == {"status": "ok"}
    assert await tiny_site.call("GET", "/ready") == {"status": "ready"}
    version = await tiny_site.call("GET", "/version")
    assert set(version) == {"version", "mlx", "mlx_lm", "device", "forms"}
    assert version["mlx"].startswith("0.")
    engine = tiny_site.app.state.engine
    await engine.stop(0.0)
    for path, code in (("/health", "engine_stopped"), ("/ready", "not_ready")):
        assert (await tiny_site.call("GET", path, status=503))["error"]["code"] == code
    assert (await tiny_site.chat(BASE, status=503))["error"]["code"] == "engine_stopped"


async def test_a_thread_that_does_not_beat_is_unhealthy(model_path: Path, root: Path) -> None:
    async with site(model_path, root, health_timeout_seconds=1e-9) as stuck:
        error = (await stuck.call("GET", "/health", status=503))["error"]
        assert (error["type"], error["code"]) == ("server_error", "engine_stuck")


async def test_metrics_count_by_routes_and_never_by_names(tiny_site: Site) -> None:
    await tiny_site.says("a")
    await tiny_site.says(None, adapters=[{"id": "a"}, {"id": "b"}])
    await tiny_site.says(BASE)
    await tiny_site.chat("nowhere-to-be-seen", status=404)
    for path in ("/v1/adapters/a", "/v1/adapters/secret-name", "/no/such/route"):
        await tiny_site.client.get(path)
    reply = await tiny_site.client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    assert "secret-name" not in reply.text
    assert "no/such" not in reply.text
    values = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }
    assert values["graft_http_requests_total", "/v1/chat/completions", "200", "POST"] == 3
    assert values["graft_http_requests_total", "/v1/chat/completions", "404", "POST"] == 1
    assert values["graft_http_requests_total", "/v1/adapters/{id}", "200", "GET"] == 1
    assert values["graft_http_requests_total", "/v1/adapters/{id}", "404", "GET"] == 1
    assert values["graft_http_requests_total", "404", "any", "none"] == 1
    assert values["graft_adapter_load_seconds_count",] == 2
    assert values["graft_adapters",] == 2
    assert values["graft_adapter_bytes",] > 0
    assert [values["graft_resolved_requests_total", kind] for kind in ("base", "adapter", "blend")] == [
        1,
        1,
        1,
    ]
    assert values["graft_completion_tokens_total",] > 0
    assert values["graft_pinned_requests",] == 0
    open_metrics = await tiny_site.client.get("/metrics", headers={"accept": "application/openmetrics-text"})
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
    assert open_metrics.text.endswith("# EOF\n")


async def test_metrics_stay_as_large_as_they_are_whatever_is_asked(tiny_site: Site) -> None:
    async def odd(number: int) -> None:
        client, name = tiny_site.client, f"odd{number}"
        await client.request(f"ODD{number}", "/health")
        await client.request(name, f"/{name}")
        await client.request(f"O{number}", "/v1/adapters/a", headers={"x-request-id": name})
        await client.post(f"/v1/adapters/{name}/rollback", json={})
        await client.post("/v1/chat/completions", json={"model": name, "messages": []})
        await client.get("/metrics", params={name: name})

    await odd(0)
    first = (await tiny_site.client.get("/metrics")).text
    for number in range(1, 50):
        await odd(number)
        await tiny_site.call("POST", "/v1/adapters", {"id": "a"}, status=201)
        await tiny_site.call("DELETE", "/v1/adapters/a")
    last = (await tiny_site.client.get("/metrics")).text
    added = {line.split(" ")[0] for line in last.splitlines()} - {
        line.split(" ")[0] for line in first.splitlines()
    }
    assert all('route="/v1/adapters' in line for line in added), added
    assert len(added) <= 2 * 16, "two calls that had not been made before"
    assert "odd" not in last.lower()
    assert 'method="other",route="/health",status="405"} 50.0' in last


async def test_a_key_guards_all_but_the_probes(model_path: Path, root: Path) -> None:
    async with site(model_path, root, api_key="k3y") as locked:
        for path in ("/health", "/ready"):
            await locked.call("GET", path)
        for method, path in (
            ("GET", "/metrics"),
            ("GET", "/version"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/tiny"),
            ("GET", "/v1/adapters"),
            ("POST", "/v1/adapters"),
            ("PUT", "/v1/adapters/active"),
            ("DELETE", "/v1/adapters/a"),
            ("POST", "/v1/adapters/a/fuse"),
            ("DELETE", "/v1/adapters/a/fuse"),
            ("POST", "/v1/load_lora_adapter"),
            ("POST", "/v1/unload_lora_adapter"),
        ):
            await locked.call(method, path, status=401)


async def test_adapters_named_at_the_start_are_loaded(model_path: Path, root: Path, tmp_path: Path) -> None:
    outside = make_adapter(tmp_path / "outside" / "o", read_model(model_path))
    async with site(model_path, root, adapters={"o": str(outside), "b": "b"}) as started:
        listing = await started.call("GET", "/v1/adapters")
        assert [(each["id"], each["path"]) for each in listing["data"]] == [("o", "o"), ("b", "b")]
        assert str(tmp_path) not in json.dumps(listing)


async def test_calls_at_the_same_time_agree_in_the_end(tiny_site: Site) -> None:
    calls = [("POST", "/v1/adapters", {"id": "a"}), ("POST", "/v1/adapters", {"id": "a", "replace": True})]
    calls += [("DELETE", "/v1/adapters/a", None), ("PUT", "/v1/adapters/active", {"id": "a"})]
    calls += [("POST", "/v1/adapters/a/fuse", None), ("DELETE", "/v1/adapters/a/fuse", None)]

    async def send(method: str, path: str, body: Any) -> int:
        return (await tiny_site.client.request(method, path, json=body)).status_code

    statuses = await asyncio.gather(
        *(send(*call) for call in calls * 4), *(_chat(tiny_site) for _ in range(4))
    )
    assert set(statuses) <= {200, 201, 404, 409}
    await tiny_site.client.delete("/v1/adapters/a/fuse")
    await tiny_site.client.delete("/v1/adapters/a")
    service: AdapterService = tiny_site.service
    assert (service.registry.entries, service.registry.fused, service.registry.in_flight) == ([], None, 0)
    assert (await service.list()).resident_bytes == 0


async def _chat(tiny_site: Site) -> int:
    body = {"model": "a", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    return (await tiny_site.client.post("/v1/chat/completions", json=body)).status_code
