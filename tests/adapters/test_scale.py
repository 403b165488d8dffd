"""A scale that is given stands in place of the one in the config, for as long as the adapter lives."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.adapters.folder import AdapterFolders
from tests.adapters.support import BASE, Site, read_model, site
from tests.models import adapter_tensors, adapter_values, write_adapter

OLD = {"lora_layers": 16, "lora_parameters": {"rank": 4, "alpha": 8, "scale": 2.0, "dropout": 0.0}}


@pytest.fixture
def old(root: Path, model_path: Path) -> Path:
    """A folder as mlx-lm of 2024 wrote it: scale 2, or 4 as the oldest read it."""
    return write_adapter(root / "old", OLD, adapter_tensors(read_model(model_path), adapter_values()))


async def test_a_load_in_doubt_warns_and_a_given_scale_settles_it(tiny_site: Site, old: Path) -> None:
    loaded = await tiny_site.call("POST", "/v1/adapters", {"id": "old"}, status=201)
    assert (loaded["scale"], "scale_given" in loaded) == (2.0, False)
    (warning,) = loaded["report"]["warnings"]
    assert "scale * alpha / rank = 4, from 0.14.2 on as scale = 2" in warning
    said = await tiny_site.says("old", max_tokens=12)
    body = {"id": "old", "replace": True, "scale": 4}
    chosen = await tiny_site.call("POST", "/v1/adapters", body)
    assert (chosen["scale"], chosen["scale_given"], chosen["version"]) == (4.0, 4.0, 2)
    assert chosen["report"]["scales"] == [4.0]
    assert "The scale 4 was given" in chosen["report"]["warnings"][0]
    assert chosen["digest"] != loaded["digest"]
    (listed,) = (await tiny_site.call("GET", "/v1/adapters"))["data"]
    assert (listed["scale"], listed["scale_given"]) == (4.0, 4.0)
    back = await tiny_site.call("POST", "/v1/adapters/old/rollback")
    assert (back["scale"], "scale_given" in back) == (2.0, False)
    assert await tiny_site.says("old", max_tokens=12) == said


async def test_a_given_scale_is_that_of_what_is_saved(tiny_site: Site, old: Path) -> None:
    await tiny_site.call("POST", "/v1/adapters", {"id": "old", "scale": 4}, status=201)
    await tiny_site.call("POST", "/v1/adapters/old/save", {"save_to": "kept"})
    kept = await tiny_site.call("POST", "/v1/adapters", {"id": "kept"}, status=201)
    assert (kept["scale"], kept["report"]["warnings"]) == (4.0, [])


async def test_vllms_load_takes_it_too(tiny_site: Site, old: Path) -> None:
    body = {"lora_name": "old", "lora_path": "old", "scale": 4}
    await tiny_site.call("POST", "/v1/load_lora_adapter", body)
    assert (await tiny_site.call("GET", "/v1/adapters/old"))["scale"] == 4.0


async def test_a_scale_that_is_none_or_of_a_blend_is_refused(tiny_site: Site, old: Path) -> None:
    for body in ({"scale": "4"}, {"scale": 1e9}, {"scale": 4, "blend": [{"id": "a"}]}):
        await tiny_site.refused("POST", "/v1/adapters", {"id": "old"} | body, 400, None)


async def test_the_operators_scale_holds_for_the_id(
    model_path: Path, root: Path, old: Path, tmp_path: Path
) -> None:
    async with site(model_path, root, base=BASE, adapter_scales={"old": 4.0}) as tiny_site:
        await tiny_site.says("old")
        shown = await tiny_site.call("GET", "/v1/adapters/old")
        assert (shown["scale"], shown["scale_given"]) == (4.0, 4.0)
        other = await tiny_site.call("POST", "/v1/adapters", {"id": "new", "path": "old"}, status=201)
        assert (other["scale"], "scale_given" in other) == (2.0, False)


def test_a_folder_that_is_found_again_keeps_its_scale(root: Path, old: Path) -> None:
    folders = AdapterFolders(root, {"mine": old}, {"old": 4.0, "mine": 5.0})
    for folder, scale in (
        (folders.find("old"), 4.0),
        (folders.find("mine"), 5.0),
        (folders.find("x", "old", 6.0), 6.0),
    ):
        assert (folder.scale, folders.again(folder).scale) == (scale, scale)
