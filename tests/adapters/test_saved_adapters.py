"""What is loaded, saved as an adapter folder: whole, the same to the bit, or refused with every reason."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from structlog.testing import capture_logs

from adapters_core.blending.blend import BlendOptions
from adapters_core.container import AdapterContainer
from adapters_core.formats.protocol import FormatName
from adapters_core.formats.writing import write_adapter
from adapters_core.layers.module_weights import ModuleWeights
from server.adapters.blending import Blender
from server.adapters.errors import (
    AdapterChangedError,
    AdapterFolderExistsError,
    AdapterNotSavedError,
    PathNotAllowedError,
)
from server.adapters.saving.adapters import AdapterSaver
from tests.adapters.support import BASE, Held, House, Site, answer_of, house, read_model, site
from tests.adapters.test_saving import no_large_files
from tests.models import make_adapter

FORMATS: tuple[FormatName, ...] = ("mlx", "peft")
TERMS = [{"id": "a", "weight": 0.7}, {"id": "b", "weight": -1.2}]
UP, EMBED = "model.layers.1.mlp.up_proj", "model.embed_tokens"


async def save(site: Site, adapter_id: str, name: str, **fields: Any) -> Any:
    return await site.call("POST", f"/v1/adapters/{adapter_id}/save", {"save_to": name, **fields})


async def refused(site: Site, adapter_id: str, body: Any, status: int, code: str | None) -> Any:
    """The error object of a save that must fail so, with nothing left of it."""
    before = sorted(os.listdir(site.root))
    error = await site.refused("POST", f"/v1/adapters/{adapter_id}/save", body, status, code)
    assert sorted(os.listdir(site.root)) == before
    return error


def weights_in(folder: Path, model_path: Path) -> dict[str, ModuleWeights]:
    return AdapterContainer.from_directory(folder).check(read_model(model_path))


def bits(weights: Mapping[str, ModuleWeights]) -> dict[str, Any]:
    """Everything about factors that decides what is computed, with rows and columns of zeros left out."""
    return {
        path: [one.scale, *map(_bits, (one.lora_a, one.lora_b, one.magnitude, one.bias))]
        for path, one in sorted(weights.items())
    }


def _bits(array: mx.array | None) -> Any:
    if array is None:
        return None
    values = np.array(array)
    if values.ndim == 2:
        values = values[values.any(axis=1)][:, values.any(axis=0)]
    return values.dtype, values.shape, values.tobytes()


@pytest.mark.parametrize("to", FORMATS)
async def test_saved_and_loaded_again_it_computes_the_same(tiny_site: Site, to: FormatName) -> None:
    make_adapter(tiny_site.root / "up", read_model(tiny_site.model), seed=8, rank=2, keys=["mlp.up_proj"])
    await tiny_site.call("POST", "/v1/adapters", {"id": "mix", "blend": [*TERMS, {"id": "up"}]}, status=201)
    for name in ("a", "d", "mix"):
        said = await tiny_site.says(name)
        saved = await save(tiny_site, name, f"{name}-saved", format=to)
        folder = tiny_site.root / f"{name}-saved"
        assert saved | {"notes": [], "bytes": 0, "digest": ""} == {
            "id": name, "object": "adapter.saved", "version": 1, "path": f"{name}-saved", "format": to,
            "modules": 12 if name == "mix" else 9, "bytes": 0, "digest": "", "notes": [],
        }  # fmt: skip
        assert saved["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
        is_padded = name == "mix" and to == "mlx"
        assert saved["notes"] == (["Ranks differ (2, 12): zeros fill factors up to 12."] if is_padded else [])
        loaded = await tiny_site.call("POST", "/v1/adapters", {"id": f"{name}-saved"}, status=201)
        assert (loaded["digest"], loaded["format"]) == (saved["digest"], to)
        assert loaded["report"]["warnings"] == []
        assert await tiny_site.says(f"{name}-saved") == said
        if name != "mix":
            original = await tiny_site.call("GET", f"/v1/adapters/{name}")
            assert (saved["digest"] == original["digest"]) == (to == "mlx")
            found, expected = (weights_in(at, tiny_site.model) for at in (folder, tiny_site.root / name))
            assert bits(found) == bits(expected)
    # A blend's own factors, which no file had before.
    made = AdapterContainer.from_directory(tiny_site.root / "mix-saved").check(read_model(tiny_site.model))
    await tiny_site.call("POST", "/v1/adapters", {"id": "again", "blend": [{"id": "mix-saved"}]}, status=201)
    await save(tiny_site, "again", "again-saved", format=to)
    assert bits(weights_in(tiny_site.root / "again-saved", tiny_site.model)) == bits(made)


async def test_names_are_those_that_requests_may_use(tiny_site: Site) -> None:
    await tiny_site.call("POST", "/v1/adapters", {"id": "mix", "blend": TERMS}, status=201)
    half = [{"id": "a", "weight": 0.5}]
    await tiny_site.call("POST", "/v1/adapters", {"id": "mix", "blend": half, "replace": True})
    said = {name: await tiny_site.says(name) for name in ("mix", "mix@1")}
    assert (await save(tiny_site, "mix", "now"))["version"] == 2
    for at, (asked, fields) in enumerate(
        [("mix@1", {}), ("mix", {"version": 1}), (f"{BASE}:mix@1", {"version": 1})]
    ):
        assert (await save(tiny_site, asked, f"first-{at}", **fields))["version"] == 1
        assert await tiny_site.says(f"first-{at}") == said["mix@1"]
    assert await tiny_site.says("now") == said["mix"]
    error = await refused(tiny_site, "mix@3", {"save_to": "x"}, 404, "model_not_found")
    assert "'mix@2', 'mix@1'" in error["message"]
    for name in ("mix@1", f"{BASE}:mix@1"):
        error = await refused(tiny_site, name, {"save_to": "x", "version": 2}, 400, "versions_differ")
        assert error["param"] == "version"


async def test_a_version_whose_folder_holds_the_next_is_saved_too(tiny_site: Site) -> None:
    said = await tiny_site.says("a")
    shutil.copytree(tiny_site.root / "a", tiny_site.root / "before")
    make_adapter(tiny_site.root / "a", read_model(tiny_site.model), seed=42)
    await tiny_site.call("POST", "/v1/adapters", {"id": "a", "replace": True})
    assert (await save(tiny_site, "a", "first", version=1))["version"] == 1
    assert await tiny_site.says("first") == said
    found, expected = (weights_in(tiny_site.root / name, tiny_site.model) for name in ("first", "before"))
    assert bits(found) == bits(expected)


async def test_a_checkpoint_becomes_an_adapter_of_its_own(tiny_site: Site) -> None:
    step = tiny_site.root / "b" / "0000100_adapters.safetensors"
    shutil.copy(tiny_site.root / "b" / "adapters.safetensors", step)
    make_adapter(tiny_site.root / "b", read_model(tiny_site.model), seed=42, rank=8)  # trained on
    said = await tiny_site.says("b@step-100")
    saved = await save(tiny_site, "b@step-100", "best")
    assert (saved["id"], saved["version"]) == ("b@step-100", 1)
    assert await tiny_site.says("best") == said != await tiny_site.says("b")
    assert (tiny_site.root / "best" / "adapters.safetensors").is_file()


async def test_what_is_nowhere_any_more_cannot_be_saved(model_path: Path, root: Path) -> None:
    async with house(model_path, root, kept_bytes=0) as forgetful:
        await forgetful.service.load("a")
        make_adapter(root / "a", read_model(model_path), seed=42)
        before = sorted(os.listdir(root))
        with pytest.raises(AdapterChangedError):
            await AdapterSaver(forgetful.service, root).save("a", "x")
        assert sorted(os.listdir(root)) == before


REFUSALS: list[tuple[str, Any, int, str | None, str | None]] = [
    ("nobody", {"save_to": "x"}, 404, "adapter_not_found", None),
    ("broken", {"save_to": "x"}, 404, "adapter_not_found", None),
    (BASE, {"save_to": "x"}, 404, "adapter_not_found", None),
    ("a", {}, 400, None, "save_to"),
    ("a", None, 400, None, None),
    ("a", {"save_to": "x", "to": "peft"}, 400, "unknown_parameter", "to"),
    ("a", {"save_to": "x", "format": "gguf"}, 400, None, "format"),
    ("a", {"save_to": "x", "version": 0}, 400, None, "version"),
    ("a", {"save_to": "x", "version": "1"}, 400, None, "version"),
    ("a", {"save_to": ""}, 400, None, "save_to"),
    ("a", {"save_to": "../x"}, 403, "path_not_allowed", "save_to"),
    ("a", {"save_to": "/x"}, 403, "path_not_allowed", "save_to"),
    ("a", {"save_to": ".x"}, 403, "path_not_allowed", "save_to"),
    ("a", {"save_to": "x/y"}, 403, "path_not_allowed", "save_to"),
    ("a", {"save_to": "x\n"}, 403, "path_not_allowed", "save_to"),
    ("a", {"save_to": "x" * 129}, 403, "path_not_allowed", "save_to"),
    ("a", {"save_to": "default"}, 400, "invalid_adapter_id", "save_to"),
    ("a", {"save_to": BASE}, 400, "invalid_adapter_id", "save_to"),
    ("a", {"save_to": "a"}, 409, "adapter_folder_exists", "save_to"),
    ("a", {"save_to": "notes"}, 409, "adapter_folder_exists", "save_to"),
    ("a", {"save_to": "x", "version": 7}, 404, "model_not_found", "version"),
]


async def test_refusals(tiny_site: Site) -> None:
    await tiny_site.call("POST", "/v1/adapters", {"id": "a"}, status=201)
    for adapter_id, body, status, code, param in REFUSALS:
        error = await refused(tiny_site, adapter_id, body, status, code)
        assert error["param"] == param, body


async def test_what_the_format_cannot_say_is_told_in_full(tiny_site: Site) -> None:
    biased = {
        path: ModuleWeights(one.lora_a, one.lora_b, None, one.scale, mx.ones(one.lora_b.shape[1:]))
        for path, one in weights_in(tiny_site.root / "a", tiny_site.model).items()
    }
    write_adapter(tiny_site.root / "biased", biased, "peft")
    said = await tiny_site.says("biased")
    error = await refused(tiny_site, "biased", {"save_to": "x"}, 422, "adapter_not_writable")
    assert error["param"] == "format"
    assert len(error["details"]) == 9
    assert all(f"module {path}: it has a bias" in " ".join(error["details"]) for path in biased)
    assert error["message"].endswith("Try the other format, peft.")
    await save(tiny_site, "biased", "x", format="peft")
    assert await tiny_site.says("x") == said


async def test_nothing_is_saved_while_one_is_fused(tiny_site: Site) -> None:
    await tiny_site.call("POST", "/v1/adapters", {"id": "a"}, status=201)
    await tiny_site.call("POST", "/v1/adapters/a/fuse")
    error = await refused(tiny_site, "a", {"save_to": "x"}, 409, "base_is_fused")
    assert "'a' cannot be saved" in error["message"]
    await tiny_site.call("DELETE", "/v1/adapters/a/fuse")
    await save(tiny_site, "a", "x")


async def test_saving_needs_an_adapters_root(tiny_house: House) -> None:
    await tiny_house.service.load("a")
    with pytest.raises(PathNotAllowedError, match="--adapters-dir"):
        await AdapterSaver(tiny_house.service, None).save("a", "x")


async def test_a_disk_that_fills_up_leaves_nothing(tiny_house: House) -> None:
    await tiny_house.service.load("b")
    before = sorted(os.listdir(tiny_house.root))
    saver = AdapterSaver(tiny_house.service, tiny_house.root)
    with no_large_files(5000), pytest.raises(AdapterNotSavedError):
        await saver.save("b", "x")
    assert sorted(os.listdir(tiny_house.root)) == before
    results = await asyncio.gather(*(saver.save("b", "x") for _ in range(2)), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["AdapterFolderExistsError", "SavedAdapter"]
    assert any(isinstance(result, AdapterFolderExistsError) for result in results)
    assert sorted(os.listdir(tiny_house.root)) == sorted([*before, "x"])


async def test_what_was_begun_is_saved_to_its_end(model_path: Path, root: Path) -> None:
    async with house(model_path, root, wrap=Held) as held:
        container, saver = held.container, AdapterSaver(held.service, root)
        assert isinstance(container, Held)
        await held.service.load("b")
        container.holds_next = True
        saving = asyncio.create_task(saver.save("b", "x"))
        try:
            async with asyncio.timeout(20):
                await container.reached.wait()
            saving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await saving
            other = asyncio.create_task(saver.save("b", "x"))
            await asyncio.sleep(0)
        finally:
            container.open.set()  # or the house could not close
        with pytest.raises(AdapterFolderExistsError):  # it waited for its turn
            await other
    assert AdapterContainer.from_directory(root / "x").type == "lora"


async def test_a_watched_root_has_it_as_a_new_adapter(model_path: Path, tmp_path: Path, root: Path) -> None:
    watched = tmp_path / "watched"
    shutil.copytree(root / "b", watched / "b")
    options = {"watched_dir": watched, "settle_seconds": 0.15, "rescan_seconds": 0.05}
    async with house(model_path, watched, **options) as tiny:
        await tiny.service.load("b")
        await tiny.service.start([])
        blender, saver = Blender(tiny.service), AdapterSaver(tiny.service, watched)
        await blender.blend("mix", [("b", 0.5)], BlendOptions())
        with capture_logs() as logs:
            await saver.save("mix", "mix")  # which stays the blend that it is while it is loaded
            saving = asyncio.create_task(saver.save("mix", "kept"))
            while not saving.done():
                for name in set(os.listdir(watched)) - {"b", "mix"}:
                    assert name.startswith(".kept.") or len(os.listdir(watched / name)) == 2
                await asyncio.sleep(0)
            await saving
            await tiny.until(lambda: tiny.service.registry.find("kept") is not None)
            said = await tiny.answer("kept")
            assert said == await tiny.answer("mix") == answer_of(model_path, watched / "kept")
        assert [line["event"] for line in logs if line["log_level"] == "warning"] == []
        assert sorted(os.listdir(watched)) == ["b", "kept", "mix"]
        mix = tiny.service.registry.get("mix")
        assert (mix.current.number, mix.current.source.shown) == (1, None)
        await tiny.service.unload("mix")
        assert (await tiny.service.load("mix")).entry.current.source.shown == "mix"
        assert await tiny.answer("mix") == said


async def test_the_file_says_which_base_it_is_for(tiny_site: Site) -> None:
    await tiny_site.call("POST", "/v1/adapters", {"id": "mix", "blend": TERMS}, status=201)
    for to, field in (("mlx", "model"), ("peft", "base_model_name_or_path")):
        await save(tiny_site, "mix", f"in-{to}", format=to)
        config = json.loads((tiny_site.root / f"in-{to}" / "adapter_config.json").read_text())
        assert config[field] == tiny_site.model.name


async def test_a_root_that_became_a_link_is_not_written_to(
    tmp_path: Path, model_path: Path, root: Path
) -> None:
    outside, models = tmp_path / "outside", tmp_path / "models"
    outside.mkdir()
    models.mkdir()
    async with site(model_path, root, models_dir=models) as started:
        await started.call("POST", "/v1/adapters", {"id": "a"}, status=201)
        for folder in (root, models):
            folder.rename(folder.with_name(f"{folder.name}-moved"))
            folder.symlink_to(outside)
        for call, code in (("save", "adapter_not_saved"), ("fuse", "model_not_saved")):
            body = {"save_to": "x"}
            error = (await started.call("POST", f"/v1/adapters/a/{call}", body, status=507))["error"]
            assert error["code"] == code
            assert "is a link that was none at the start" in error["message"]
        assert list(outside.iterdir()) == []
