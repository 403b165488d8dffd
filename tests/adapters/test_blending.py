"""Named blends over the real application: made, served, replaced, brought back, refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from adapters_core.blending.blend import BlendOptions
from server.adapters.blending import Blender
from server.adapters.errors import AdapterMemoryError, BaseIsFusedError
from tests.adapters.support import BASE, Held, House, Site, house, in_memory, read_model
from tests.models import make_adapter, snapshot

TERMS = [{"id": "a", "weight": 0.7}, {"id": "b", "weight": -1.2}]


async def blend(site: Site, name: str = "mix", status: int = 201, **fields: Any) -> Any:
    body = {"id": name, "blend": TERMS, **fields}
    return await site.call("POST", "/v1/adapters", body, status=status)


async def likely(site: Site, model: str | None, **fields: Any) -> list[tuple[str, float]]:
    """The tokens of an answer and their log-probabilities."""
    reply = await site.chat(model, logprobs=True, **fields)
    return [(one["token"], one["logprob"]) for one in reply["choices"][0]["logprobs"]["content"]]


@pytest.fixture
async def loaded_site(tiny_site: Site) -> Site:
    """With what refusals name, so that a refusal changes nothing at all."""
    for name in ("a", "b", "d"):
        await tiny_site.call("POST", "/v1/adapters", {"id": name}, status=201)
    return tiny_site


@asynccontextmanager
async def blending_house(model: Path, root: Path, **options: Any) -> AsyncIterator[tuple[House, Blender]]:
    async with house(model, root, **options) as started:
        yield started, Blender(started.service)


async def test_a_linear_blend_answers_as_its_weights(tiny_site: Site) -> None:
    made = await blend(tiny_site)
    for model, fields in ((None, {"adapters": TERMS}), ("mix", {})):
        assert await likely(tiny_site, model, **fields) == [
            (token, pytest.approx(logprob, abs=1e-5)) for token, logprob in await likely(tiny_site, "mix")
        ]
    assert await tiny_site.says("mix") not in {await tiny_site.says(name) for name in ("a", "b", None)}

    assert (made["id"], made["path"], made["type"], made["rank"], made["scale"]) == (
        "mix",
        None,
        "lora",
        12,
        1.0,
    )
    assert (made["modules"], made["version"], made["state"], made["resident"]) == (9, 1, "ready", True)
    parts = [await tiny_site.call("GET", f"/v1/adapters/{name}") for name in ("a", "b")]
    recipe = made["blend"]
    assert recipe.pop("seconds") > 0
    assert recipe == {
        "method": "linear", "density": None, "rank": None, "seed": None,
        "error_mean": 0.0, "error_worst": 0.0, "worst_module": None,
        "parts": [
            {**term, "version": 1, "digest": part["digest"]} for term, part in zip(TERMS, parts, strict=True)
        ],
    }  # fmt: skip
    assert [part["blend"] for part in parts] == [None, None]
    models = await tiny_site.call("GET", "/v1/models")
    assert ("mix", None) in [(model["id"], model["root"]) for model in models["data"]]


@pytest.mark.parametrize(
    ("fields", "rank"),
    [
        ({"method": "svd", "rank": 3}, 3),
        ({"method": "ties", "density": 0.5}, 8),
        ({"method": "dare_linear", "density": 0.9, "rank": 6, "seed": 5}, 6),
        ({"method": "dare_ties", "density": 1}, 8),
    ],
)
async def test_each_method(tiny_site: Site, fields: dict[str, Any], rank: int) -> None:
    made = await blend(tiny_site, pinned=True, activate=True, **fields)
    assert (made["pinned"], made["active"], made["rank"]) == (True, True, rank)
    recipe = made["blend"]
    assert {name: recipe[name] for name in fields} == fields
    assert 0 < recipe["error_mean"] <= recipe["error_worst"] < 1
    assert recipe["worst_module"].startswith("model.layers.")
    assert recipe["seed"] == fields.get("seed", 0 if fields["method"].startswith("dare") else None)
    again = await blend(tiny_site, "again", **fields)
    assert again["digest"] == made["digest"]
    assert await tiny_site.says(None) == await tiny_site.says("again")


async def test_replace_and_roll_back(tiny_site: Site) -> None:
    await blend(tiny_site)
    first = await tiny_site.says("mix")
    await tiny_site.refused("POST", "/v1/adapters", {"id": "mix", "blend": TERMS}, 409, "adapter_exists")
    terms = [{"id": "a", "weight": 1.5}]
    second = await blend(tiny_site, status=200, replace=True, blend=terms)
    assert (second["version"], second["blend"]["parts"][0]["weight"]) == (2, 1.5)
    assert await tiny_site.says("mix") == await tiny_site.says(None, adapters=terms)
    assert await tiny_site.says("mix@1") == first
    back = await tiny_site.call("POST", "/v1/adapters/mix/rollback")
    assert (back["version"], len(back["blend"]["parts"])) == (1, 2)
    assert await tiny_site.says("mix") == first


async def test_a_blend_outlives_its_parts_and_can_be_a_part(tiny_site: Site) -> None:
    await blend(tiny_site)
    terms = [{"id": "mix", "weight": 0.5}, {"id": "b", "weight": 0.6}]
    await blend(tiny_site, "half", blend=terms)
    halved = [{"id": "a", "weight": 0.35}]
    assert await likely(tiny_site, "half") == [
        (token, pytest.approx(logprob, abs=1e-4))
        for token, logprob in await likely(tiny_site, None, adapters=halved)
    ]
    said = await tiny_site.says("mix")
    for name in ("a", "b"):
        await tiny_site.call("DELETE", f"/v1/adapters/{name}")
    assert await tiny_site.says("mix") == said
    assert (await blend(tiny_site, "more", blend=[{"id": "mix"}]))["modules"] == 9
    await tiny_site.call("DELETE", "/v1/adapters/mix")
    assert await tiny_site.ids() == ["half", "more"]


async def test_what_was_loaded_is_blended_and_not_what_its_folder_holds_now(tiny_site: Site) -> None:
    made = await blend(tiny_site)
    make_adapter(tiny_site.root / "a", read_model(tiny_site.model), seed=9)
    assert (await blend(tiny_site, "same"))["digest"] == made["digest"]
    half = await blend(tiny_site, "half", blend=[{"id": "mix", "weight": 0.5}])
    await tiny_site.call("POST", "/v1/adapters", {"id": "a", "replace": True})
    terms = [{"id": "a@1", "weight": 0.7}, TERMS[1]]
    assert (await blend(tiny_site, "old", blend=terms))["digest"] == made["digest"]
    new = await blend(tiny_site, "new")
    assert new["blend"]["parts"][0]["version"] == 2
    assert new["digest"] != made["digest"]
    # Without a copy, what nobody has any more is refused.
    service = tiny_site.service
    service.keeper.drop(service.registry.get("a").current)
    make_adapter(tiny_site.root / "a", read_model(tiny_site.model), seed=10)
    body = {"id": "newer", "blend": TERMS}
    error = await tiny_site.refused("POST", "/v1/adapters", body, 409, "adapter_changed")
    assert error["param"] == "blend"
    assert "'a'" in error["message"]
    again = await blend(tiny_site, "again", blend=[{"id": "mix", "weight": 0.5}])
    assert again["digest"] == half["digest"]


async def test_what_left_memory_comes_back(model_path: Path, equal_root: Path, size_bytes: int) -> None:
    async with blending_house(model_path, equal_root, memory_bytes=3 * size_bytes) as (tight, blender):
        made = await blender.blend("mix", [("a", 0.5), ("b", 2.0)], BlendOptions())
        answer = await tight.answer("mix")
        digest = made.entry.current.resident.digest
        for name in ("a", "b", "c"):
            await tight.answer(name)
        assert "mix" not in in_memory(tight)
        assert await tight.answer("mix") == answer
        assert (made.entry.current.resident.digest, made.entry.current.number) == (digest, 1)
        with pytest.raises(AdapterMemoryError):
            await blender.blend("large", [(name, 1.0) for name in "abce"], BlendOptions())
        assert tight.service.registry.find("large") is None
        cut = await blender.blend("cut", [(name, 1.0) for name in "abce"], BlendOptions("svd"))
        assert cut.entry.current.size_bytes == size_bytes


async def test_a_blend_that_was_begun_is_made_though_its_caller_left(model_path: Path, root: Path) -> None:
    async with house(model_path, root, wrap=Held) as held:
        container, blender = held.container, Blender(held.service)
        assert isinstance(container, Held)
        await held.service.load("a")
        container.holds_next = True
        blending = asyncio.create_task(blender.blend("mix", [("a", 0.5)], BlendOptions()))
        try:
            async with asyncio.timeout(20):
                await container.reached.wait()
            blending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await blending
        finally:
            container.open.set()  # or the house could not close
        await held.until(lambda: held.service.registry.find("mix") is not None)
        assert await held.answer("mix") == await held.answer(None, [("a", 0.5)])


REFUSALS: list[tuple[dict[str, Any], int, str | None, str | None]] = [
    ({"path": "a"}, 400, None, "path"),
    ({"blend": None, "method": "svd"}, 400, None, "method"),
    ({"blend": None, "density": 0.5}, 400, None, "density"),
    ({"blend": []}, 400, None, "blend"),
    ({"blend": [{"id": "a"}] * 2}, 400, None, "blend"),
    ({"blend": [{"id": "a"}] * 33}, 400, None, "blend"),
    ({"blend": [{"id": "a", "weight": 1e9}]}, 400, None, "blend[0].weight"),
    ({"blend": [{"id": "a", "weight": 0}]}, 400, "not_blendable", "blend"),
    ({"blend": [{"id": "a", "scale": 2}]}, 400, "unknown_parameter", "blend[0].scale"),
    ({"blend": [{"id": "d"}, {"id": "a"}]}, 400, "not_blendable", "blend"),
    ({"blend": [{"id": "a"}, {"id": "nobody"}]}, 404, "adapter_not_found", "blend"),
    ({"blend": [{"id": "default"}]}, 404, "adapter_not_found", "blend"),
    ({"blend": [{"id": "tiny"}]}, 404, "adapter_not_found", "blend"),
    ({"blend": [{"id": "a@7"}]}, 404, "model_not_found", "blend"),
    ({"blend": [{"id": "broken"}]}, 422, "adapter_invalid", None),
    ({"method": "mean"}, 400, None, "method"),
    ({"method": "ties"}, 400, "not_blendable", "density"),
    ({"method": "ties", "density": 0}, 400, "not_blendable", "density"),
    ({"method": "dare_ties", "density": 1.5}, 400, "not_blendable", "density"),
    ({"method": "svd", "density": 0.5}, 400, "not_blendable", "density"),
    ({"method": "svd", "rank": 0}, 400, "not_blendable", "rank"),
    ({"method": "svd", "rank": 1.5}, 400, None, "rank"),
    ({"rank": 4}, 400, "not_blendable", "rank"),
    ({"seed": 4}, 400, "not_blendable", "seed"),
    ({"id": "tiny"}, 400, "invalid_adapter_id", "id"),
]


async def test_refusals(loaded_site: Site) -> None:
    for fields, status, code, param in REFUSALS:
        given = {"id": "mix", "blend": TERMS, **fields}
        body = {name: value for name, value in given.items() if value is not None}
        error = await loaded_site.refused("POST", "/v1/adapters", body, status, code)
        assert error["param"] == param, fields


async def test_a_field_that_is_none_is_named(loaded_site: Site) -> None:
    for body, name in (
        ({"id": "q", "what": 1}, "what"),
        ({"id": "q", "blend": [{"id": "a", "scale": 2}]}, "blend[0].scale"),
    ):
        error = await loaded_site.refused("POST", "/v1/adapters", body, 400, "unknown_parameter")
        assert error["message"] == f"'{name}' is not a field of this call."


async def test_a_dora_is_named(loaded_site: Site) -> None:
    body = {"id": "mix", "blend": [{"id": "a"}, {"id": "d"}]}
    error = await loaded_site.refused("POST", "/v1/adapters", body, 400, "not_blendable")
    assert len(error["details"]) == 1
    assert "'d' is a DoRA adapter" in error["message"]
    error = (await loaded_site.chat(None, status=400, adapters=body["blend"]))["error"]
    assert (error["code"], error["param"]) == ("not_blendable", "adapters")
    assert error["message"].startswith("A DoRA adapter ('d') rescales the base,")


async def test_all_problems_are_told_at_once(loaded_site: Site) -> None:
    parts = [{"id": "a", "weight": 0}, {"id": "d", "weight": 0}]
    body = {"id": "mix", "blend": parts, "rank": 3}
    error = await loaded_site.refused("POST", "/v1/adapters", body, 400, "not_blendable")
    assert [problem.partition(":")[0] for problem in error["details"]] == ["rank", "blend"]
    body = {"id": "mix", "blend": [{"id": "b"}, {"id": f"{BASE}:d@1"}], "method": "ties", "seed": 1}
    error = await loaded_site.refused("POST", "/v1/adapters", body, 400, "not_blendable")
    assert [problem.partition(":")[0] for problem in error["details"]] == ["density", "seed", "blend"]
    assert "'tiny:d@1' is a DoRA adapter" in error["message"]


async def test_nothing_is_blended_while_one_is_fused(tiny_site: Site) -> None:
    await tiny_site.call("POST", "/v1/adapters", {"id": "a"}, status=201)
    await tiny_site.call("POST", "/v1/adapters/a/fuse")
    body = {"id": "mix", "blend": [{"id": "a"}]}
    error = await tiny_site.refused("POST", "/v1/adapters", body, 409, "base_is_fused")
    assert "'mix' cannot be blended" in error["message"]


async def test_what_blends_read_of_the_base_is_not_fused_meanwhile(model_path: Path, root: Path) -> None:
    async with blending_house(model_path, root) as (tiny, _):
        base = await tiny.snapshot()
        await tiny.service.load("a")
        model = await tiny.service.bare_model("it cannot be blended")
        bare = snapshot(model)
        assert bare.keys() == base.keys()
        await tiny.service.fuse("a", "keep")
        assert (await tiny.snapshot()).keys() != base.keys()
        assert snapshot(model) == bare
        with pytest.raises(BaseIsFusedError, match="it cannot be blended"):
            await tiny.service.bare_model("it cannot be blended")


async def test_the_names_of_parts_are_those_that_requests_may_use(tiny_site: Site) -> None:
    await tiny_site.call("POST", "/v1/adapters", {"id": "b"}, status=201)
    parts = [{"id": f"{BASE}:a", "weight": 0.5}, {"id": f"{BASE}:b@1", "weight": 0.5}]
    made = await blend(tiny_site, blend=parts)
    assert [part["id"] for part in made["blend"]["parts"]] == ["a", "b@1"]
    longest = f"{BASE}:{'x' * 128}@step-{'1' * 18}@{'1' * 9}"
    body = {"id": "new", "blend": [{"id": longest}]}
    await tiny_site.refused("POST", "/v1/adapters", body, 404, "adapter_not_found")


async def test_a_blend_is_fused_as_any_adapter(tiny_site: Site) -> None:
    await blend(tiny_site, method="ties", density=0.5)
    base, said = await tiny_site.says(BASE), await tiny_site.says("mix")
    assert base != said
    await tiny_site.call("POST", "/v1/adapters/mix/fuse", {"unload_others": True})
    assert await tiny_site.says(BASE) == said
    await tiny_site.call("DELETE", "/v1/adapters/mix/fuse")
    assert [await tiny_site.says(BASE), await tiny_site.says("mix")] == [base, said]


async def test_one_part_at_weight_one_is_the_part(tiny_site: Site) -> None:
    for method in ("linear", "svd"):
        await blend(tiny_site, method, blend=[{"id": "b"}], method=method)
        assert await tiny_site.says(method) == await tiny_site.says("b")
    assert (await tiny_site.call("GET", "/v1/adapters/svd"))["rank"] == 8
