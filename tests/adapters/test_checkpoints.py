"""Checkpoints that a training writes: found beside the adapter, loaded when a request names them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from adapters_core.blending.blend import BlendOptions
from adapters_core.errors import InvalidAdapterError
from server.adapters.blending import Blender
from server.adapters.errors import AdapterNotFoundError, UnknownCheckpointError, UnknownModelError
from server.adapters.folder import AdapterFolders
from tests.adapters.support import Site, answer_of, house, read_model
from tests.models import make_adapter


def checkpoint(model_path: Path, folder: Path, step: int, seed: int) -> list[int]:
    """A checkpoint as mlx-lm's trainer leaves it beside the adapter; returns what it answers."""
    other = make_adapter(folder.parent / f".made{step}", read_model(model_path), seed=seed)
    answer = answer_of(model_path, other)
    shutil.move(other / "adapters.safetensors", folder / f"{step:07d}_adapters.safetensors")
    shutil.rmtree(other)
    return answer


async def test_a_checkpoint_is_an_adapter_of_its_own(
    model_path: Path, own_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    answers = {step: checkpoint(model_path, own_root / "a", step, 200 + step) for step in (100, 12345678)}
    async with house(model_path, own_root, memory_bytes=size_bytes) as tight:
        for _ in range(2):  # they leave memory for each other, and come back
            assert await tight.answer("a@step-100") == answers[100]
            assert await tight.answer("tiny:a@step-12345678") == answers[12345678]
            assert await tight.answer("a") == expected["a"]
        registry = tight.service.registry
        assert registry.served == ["tiny", "a@step-100", "a@step-12345678", "a"]
        assert await tight.answer("a@step-100@1") == answers[100]
        with pytest.raises(UnknownCheckpointError, match="'a@step-12345678', 'a@step-100'"):
            await tight.service.resolve("a@step-200")
        for missing in ("b@step-100", "nowhere@step-100", "A@step-100"):
            with pytest.raises(UnknownModelError):
                await tight.service.resolve(missing)

        # Written anew, it is its own next version when it comes back.
        await tight.answer("a")
        answers[100] = checkpoint(model_path, own_root / "a", 100, 7)
        assert await tight.answer("a@step-100") == answers[100]
        assert registry.get("a@step-100").current.number == 2

        # A trainer that keeps the last few removes it; what was loaded stays.
        await tight.answer("a")
        (own_root / "a" / "0000100_adapters.safetensors").unlink()
        assert await tight.answer("a@step-100") == answers[100]
        assert await tight.answer("a@step-100@1") != answers[100]

        await tight.service.unload("a@step-100")
        with pytest.raises(UnknownModelError):
            await tight.service.resolve("a@step-100")
        await tight.service.unload("a")
        assert await tight.answer("a@step-12345678") == answers[12345678]  # loaded, so it stays
        await tight.service.unload("a@step-12345678")
        with pytest.raises(UnknownModelError):
            await tight.service.resolve("a@step-12345678")


async def test_folders_that_peft_trainers_write_while_there_is_no_adapter_yet(
    model_path: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    model = read_model(model_path)
    for step in (5, 10):
        make_adapter(root / "run" / f"checkpoint-{step}", model, seed=300 + step)
    (root / "run" / "checkpoint-15").mkdir()
    (root / "run" / "checkpoint-15" / "adapter_config.json").write_text("{}")
    outside = make_adapter(tmp_path / "mine" / "checkpoint-5", model, seed=9)
    make_adapter(tmp_path / "mine", model, seed=8)
    async with house(model_path, root, configured={"mine": tmp_path / "mine"}) as tiny:
        assert await tiny.answer("run@step-5") == answer_of(model_path, root / "run" / "checkpoint-5")
        there = re.escape("'run@step-15', 'run@step-10', 'run@step-5'.")
        for name in ("run", "run@step-7"):
            with pytest.raises(UnknownCheckpointError, match=f"'{name}' to be loaded.*{there}") as raised:
                await tiny.service.resolve(name)
            assert raised.value.param == "model"
            with pytest.raises(UnknownCheckpointError, match=there) as raised:
                await tiny.service.resolve(None, [(name, 0.5)])
            assert raised.value.param == "adapters"
            with pytest.raises(UnknownCheckpointError, match=there) as raised:
                await Blender(tiny.service).blend("mix", [(name, 1.0)], BlendOptions())
            assert raised.value.param == "blend"
        with pytest.raises(InvalidAdapterError, match=f"checkpoints, .* {there[:-2]}"):
            await tiny.service.load("run")
        with pytest.raises(InvalidAdapterError, match="expected a file") as invalid:
            await tiny.service.load("other", "run")
        assert "checkpoints" not in str(invalid.value)
        with pytest.raises(InvalidAdapterError):
            await tiny.service.resolve("run@step-15")
        assert (await tiny.service.list()).checkpoints == {"run": [5, 10, 15]}
        await tiny.service.load("mine")
        assert await tiny.answer("mine@step-5") == answer_of(model_path, outside)


def test_a_checkpoint_that_leads_out_of_the_root_is_not_read(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for folder in (root / "a", tmp_path / "secret"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "0000007_adapters.safetensors").write_bytes(b"")
    (root / "a" / "0000001_adapters.safetensors").symlink_to(tmp_path / "secret" / "adapter_config.json")
    (root / "a" / "checkpoint-2").symlink_to(tmp_path / "secret")
    folders = AdapterFolders(root)
    for step in (1, 2, 3):
        assert folders.checkpoint("a", step, None) is None
    found = folders.checkpoint("a", 7, None)
    assert found is not None
    assert (found.shown, found.weights_file) == ("a", "0000007_adapters.safetensors")
    assert folders.again(found) == found
    (root / "a" / "0000007_adapters.safetensors").unlink()
    with pytest.raises(AdapterNotFoundError):
        folders.again(found)
    assert AdapterFolders(None).checkpoint("a", 1, None) is None


def test_what_is_listed_can_be_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for step in ("0000003", "0000000100", "12345678", "0012345678", "200"):
        (folder / f"{step}_adapters.safetensors").write_bytes(b"")
    for step in ("5", "07", "9"):
        (folder / f"checkpoint-{step}").mkdir()
    for step in ("5", "07"):
        (folder / f"checkpoint-{step}" / "adapter_config.json").write_text("{}")
    folders = AdapterFolders(tmp_path)
    assert folders.trainings("base") == {"a": [5]}  # files have no config to be read by yet
    (folder / "adapter_config.json").write_text("{}")
    assert folders.trainings("base") == {"a": [3, 5, 12345678]}
    assert all(folders.checkpoint("a", step, None) is not None for step in (3, 5, 12345678))


def test_without_a_root_there_are_no_checkpoints(tmp_path: Path) -> None:
    assert (AdapterFolders(None).trainings("base"), AdapterFolders(tmp_path / "x").trainings("base")) == (
        {},
        {},
    )


async def test_checkpoints_are_shown_and_served_by_name(tiny_site: Site, model_path: Path) -> None:
    checkpoint(model_path, tiny_site.root / "a", 200, 1)
    checkpoint(model_path, tiny_site.root / "a", 100, 2)
    listing = await tiny_site.call("GET", "/v1/adapters")
    assert listing["checkpoints"] == {"a": [100, 200]}
    assert "a@step-100" not in listing["available"]
    await tiny_site.call("POST", "/v1/adapters", {"id": "a"}, status=201)
    assert (await tiny_site.call("GET", "/v1/adapters/a"))["checkpoints"] == [100, 200]
    reply = await tiny_site.chat("a@step-100")
    assert reply["model"] == "a@step-100"
    shown = await tiny_site.call("GET", "/v1/adapters/a@step-100")
    assert (shown["id"], shown["path"], shown["version"], shown["checkpoints"]) == ("a@step-100", "a", 1, [])
    assert (await tiny_site.call("GET", "/v1/models/a@step-100"))["parent"] == "tiny"
    await tiny_site.refused("POST", "/v1/adapters", {"id": "a@step-200"}, 400, "invalid_adapter_id")
    await tiny_site.call("DELETE", "/v1/adapters/a@step-100")
    assert (await tiny_site.chat("a@step-100", status=404))["error"]["code"] == "model_not_found"
