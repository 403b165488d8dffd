"""`GET /v1/models/{id}` for names with a version or a step: what a request may name, and nothing else."""

from __future__ import annotations

import shutil

from tests.adapters.support import BASE, Site, read_model
from tests.models import make_adapter


async def test_versions_that_live_are_models_too(tiny_site: Site) -> None:
    await tiny_site.call("POST", "/v1/adapters", {"id": "a"}, status=201)
    first = await tiny_site.call("GET", "/v1/models/a")
    assert await tiny_site.call("GET", "/v1/models/a@1") == first | {"id": "a@1"}
    await tiny_site.call("POST", "/v1/adapters", {"id": "a", "path": "b", "replace": True})
    assert await tiny_site.call("GET", "/v1/models/a@1") == first | {"id": "a@1"}
    second = await tiny_site.call("GET", f"/v1/models/{BASE}:a@2")
    assert second == await tiny_site.call("GET", "/v1/models/a") | {"id": "a@2"}
    assert (second["root"], second["parent"]) == ("b", BASE)
    for name in ("a@1", "a@2"):
        assert await tiny_site.says(name)  # which is what it was asked for
    error = await tiny_site.refused("GET", "/v1/models/a@3", None, 404, "model_not_found")
    assert "'a@2', 'a@1'" in error["message"]
    for name in ("b@1", f"{BASE}:{BASE}", "a@0", "a@", "a@x", "@1", f"{BASE}@1", "default@1"):
        error = await tiny_site.refused("GET", f"/v1/models/{name}", None, 404, "model_not_found")
        assert f"'{BASE}', 'a'" in error["message"]


async def test_versions_that_live_are_adapters_too(tiny_site: Site) -> None:
    await tiny_site.call("POST", "/v1/adapters", {"id": "a", "activate": True}, status=201)
    first = await tiny_site.call("GET", "/v1/adapters/a")
    await tiny_site.call("POST", "/v1/adapters", {"id": "a", "path": "d", "replace": True})
    second = await tiny_site.call("GET", "/v1/adapters/a")
    shown = await tiny_site.call("GET", "/v1/adapters/a@1")
    same = ("digest", "path", "type", "rank", "report", "version")
    assert {name: shown[name] for name in same} == {name: first[name] for name in same}
    assert (shown["id"], shown["active"], shown["versions"]) == ("a@1", False, second["versions"])
    assert await tiny_site.call("GET", f"/v1/adapters/{BASE}:a@2") == second | {"id": "a@2"}
    error = await tiny_site.refused("GET", "/v1/adapters/a@3", None, 404, "adapter_not_found")
    assert "'a@2', 'a@1'" in error["message"]
    await tiny_site.refused("GET", "/v1/adapters/b@1", None, 404, "adapter_not_found")


async def test_checkpoints_are_models_before_and_after_they_are_loaded(tiny_site: Site) -> None:
    folder = make_adapter(tiny_site.root / "run", read_model(tiny_site.model), seed=5)
    shutil.copy(folder / "adapters.safetensors", folder / "0000100_adapters.safetensors")
    before = await tiny_site.call("GET", "/v1/models/run@step-100")
    assert (before["id"], before["state"]) == ("run@step-100", "available")
    await tiny_site.says("run@step-100")
    shown = await tiny_site.call("GET", "/v1/models/run@step-100")
    assert (shown["id"], shown["parent"]) == ("run@step-100", BASE)
    assert await tiny_site.call("GET", "/v1/models/run@step-100@1") == shown | {"id": "run@step-100@1"}
    await tiny_site.refused("GET", "/v1/models/run@step-200", None, 404, "model_not_found")
    await tiny_site.refused("GET", "/v1/models/run@step-100@2", None, 404, "model_not_found")


async def test_while_one_is_fused_only_its_own_version_is_served(tiny_site: Site) -> None:
    await tiny_site.call("POST", "/v1/adapters", {"id": "a"}, status=201)
    await tiny_site.call("POST", "/v1/adapters", {"id": "a", "path": "b", "replace": True})
    await tiny_site.call("POST", "/v1/adapters/a/fuse")
    assert (await tiny_site.call("GET", "/v1/models/a@2"))["state"] == "fused"
    await tiny_site.refused("GET", "/v1/models/a@1", None, 409, "base_is_fused")
