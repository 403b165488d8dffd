"""What was loaded is fused, blended and read again, although its folder holds something else by now."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from adapters_core.bank import AdapterBank
from adapters_core.blending.blend import BlendOptions
from adapters_core.container import AdapterContainer
from adapters_core.formats.weights import digest_of
from adapters_core.layers.module_weights import ModuleWeights
from adapters_core.mixed.routing import Routing
from server.adapters.blending import Blender
from server.adapters.copies import FilesCopy, ModulesCopy, RowsCopy
from server.adapters.errors import AdapterChangedError, AdapterNotReadableError, BlendPartChangedError
from server.adapters.folder import AdapterFolder
from server.adapters.originals import read_version
from tests.adapters.support import BASE, House, answer_of, house, read_model
from tests.models import make_adapter, snapshot


async def overwrite(tiny: House, model_path: Path, name: str, kind: str = "lora", seed: int = 40) -> None:
    """Something else in the folder of an adapter, as its next version, and back."""
    make_adapter(tiny.root / name, read_model(model_path), kind, seed=seed)
    await tiny.service.load(name, replace=True)
    await tiny.service.roll_back(name)


def arrays(taken: dict[str, bytes]) -> dict[str, bytes]:
    """The weights of a model, and not which modules they lie in."""
    return {name: content for name, content in taken.items() if not name.startswith("module ")}


@pytest.mark.parametrize(("name", "kind"), [("a", "lora"), ("d", "dora")])
async def test_what_was_rolled_back_is_fused_and_unfused(
    model_path: Path, root: Path, tmp_path: Path, name: str, kind: str
) -> None:
    old = Path(shutil.copytree(root / name, tmp_path / "old"))
    async with house(model_path, root, models_dir=tmp_path) as tiny:
        bits = await tiny.snapshot()
        await tiny.service.load(name)
        await overwrite(tiny, model_path, name, kind)
        assert await tiny.answer(name) == answer_of(model_path, old)

        model = read_model(model_path)
        AdapterContainer.from_directory(old).fuse(with_=model, precision="auto")
        await tiny.service.save_fused(name, "auto", "saved")
        assert arrays(snapshot(read_model(tmp_path / "saved"))) == arrays(snapshot(model))
        await tiny.service.fuse(name, "auto")
        assert arrays(await tiny.snapshot()) == arrays(snapshot(model))
        await tiny.service.unfuse(name)
        assert await tiny.answer(name) == answer_of(model_path, old)
        await tiny.service.roll_back(name)
        assert await tiny.answer(name) == answer_of(model_path, root / name)
        await tiny.service.unload(name)
        assert await tiny.snapshot() == bits


async def test_old_versions_are_blended_and_blends_outlive_what_their_parts_were(
    model_path: Path, root: Path, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(root / "a", tmp_path / "old"))
    async with house(model_path, root) as tiny:
        await tiny.service.load("a")
        make_adapter(root / "a", read_model(model_path), seed=41)
        await tiny.service.load("a", replace=True)
        blender = Blender(tiny.service)
        entry = (await blender.blend("mix", [("a@1", 1.0), ("b", 1e-9)], BlendOptions())).entry
        assert await tiny.answer("mix") == answer_of(model_path, old)
        for name in ("a", "b"):
            await tiny.service.unload(name)
            make_adapter(root / name, read_model(model_path), seed=43)
        await tiny.service.fuse("mix", "auto")
        assert await tiny.answer(BASE) == answer_of(model_path, old)
        await tiny.service.unfuse("mix")
        await blender.blend("again", [("mix", 1.0)], BlendOptions())
        assert await tiny.answer("again") == answer_of(model_path, old)
        tiny.service.keeper.drop(entry.current)  # without it, it would have to be made again
        with pytest.raises(BlendPartChangedError, match="'a@1'"):
            await blender.blend("more", [("mix", 1.0)], BlendOptions())
        assert tiny.service.registry.find("more") is None


async def test_of_what_is_only_in_memory_what_is_served_is_kept(model_path: Path, root: Path) -> None:
    expected = answer_of(model_path, root / "a")
    async with house(model_path, root) as tiny:
        await tiny.service.load("a")
        entry = tiny.service.registry.get("a")
        tiny.service.keeper.drop(entry.current)
        await overwrite(tiny, model_path, "a")
        assert isinstance(entry.current.copy, RowsCopy)
        assert (entry.current.number, await tiny.answer("a")) == (1, expected)
        with pytest.raises(AdapterChangedError):
            await tiny.service.fuse("a", "auto")
        with pytest.raises(BlendPartChangedError):
            await Blender(tiny.service).blend("mix", [("a", 1.0)], BlendOptions())
        assert await tiny.answer("a") == expected


async def test_of_what_its_folder_still_holds_the_files_are_kept(model_path: Path, root: Path) -> None:
    async with house(model_path, root) as tiny:
        await tiny.service.load("a")
        entry = tiny.service.registry.get("a")
        tiny.service.keeper.drop(entry.current)
        await tiny.service.load("a", "b", replace=True)
        assert entry.previous is not None
        assert isinstance(entry.previous.copy, FilesCopy)
        # A copy that was damaged is not what is read, as long as the folder has it.
        (entry.previous.copy.folder.path / "adapters.safetensors").write_bytes(b"damaged")
        adapter = read_version(entry.previous, read_model(model_path), "a")
        assert adapter.digest == AdapterContainer.from_directory(root / "a").digest
        make_adapter(root / "a", read_model(model_path), seed=42)
        with pytest.raises(AdapterChangedError):
            read_version(entry.previous, read_model(model_path), "a")


def test_each_copy_gives_back_what_it_was_made_of(model_path: Path, root: Path, tmp_path: Path) -> None:
    bank = AdapterBank(read_model(model_path), Routing())
    for name in ("a", "d"):
        original = AdapterContainer.from_directory(root / name)
        prepared = bank.prepare(original)
        files = FilesCopy.of(AdapterFolder(root / name, name), tmp_path / f"{name}-files")
        assert files.size_bytes == sum(file.stat().st_size for file in (root / name).iterdir())
        assert files.container(name).digest == original.digest
        rows = RowsCopy.of(prepared, tmp_path / f"{name}-rows")
        for copy in (files, rows):
            again = copy.prepare(bank)
            assert again.resident.digest == original.digest
            assert digest_of(again.rows) == digest_of(prepared.rows)
        with pytest.raises(AdapterNotReadableError):
            rows.container(name)
        for copy in (files, rows):
            copy.remove()
            copy.remove()
    assert list(tmp_path.glob("*-*")) == []


def test_a_copy_of_modules_has_all_that_they_are(model_path: Path, root: Path, tmp_path: Path) -> None:
    weights = AdapterContainer.from_directory(root / "a").check(read_model(model_path))
    first, second, third, *_ = weights
    bias = mx.random.normal((weights[first].lora_b.shape[1],))
    parts = [(weights[second].lora_a, half) for half in mx.split(weights[second].lora_b, 2, axis=1)]
    changed = {
        **weights,
        first: replace(weights[first], bias=bias, scale=0.3),
        second: ModuleWeights.of_parts(parts, 1.5),
        third: replace(weights[third], lookup_only=True),
    }
    original = AdapterContainer.from_weights(changed, "made")
    copy = ModulesCopy.of(changed, tmp_path / "made")
    again = copy.container("made")
    assert again.digest == original.digest
    assert copy.size_bytes == copy.file.path.stat().st_size
    assert copy.size_bytes <= ModulesCopy.most_bytes(changed) <= copy.size_bytes + 10_000
    copy.remove()
    assert list(tmp_path.glob("made*")) == []


async def test_without_room_for_all_copies_those_of_what_folders_hold_go_before_those_for_rollbacks(
    model_path: Path, own_root: Path
) -> None:
    one_bytes = sum(file.stat().st_size for file in (own_root / "a").iterdir())
    async with house(model_path, own_root, kept_bytes=int(2.5 * one_bytes)) as tiny:
        registry = tiny.service.registry

        def kept() -> set[tuple[str, int]]:
            return {
                (entry.id, version.number)
                for entry in registry.entries
                for version in entry.versions
                if version.kept
            }

        for name in ("a", "b"):
            await tiny.service.load(name)
        assert kept() == {("a", 1), ("b", 1)}
        first = await tiny.answer("a")
        make_adapter(own_root / "a", read_model(model_path), seed=44)
        await tiny.service.load("a", replace=True)
        assert kept() == {("a", 1), ("a", 2)}
        await tiny.service.load("c")
        assert kept() == {("a", 1), ("c", 1)}
        await tiny.service.roll_back("a")
        assert kept() == {("a", 1), ("a", 2)}  # of its folder again, which still held it
        await tiny.service.load("e")  # no load costs a rollback, nor what was rolled back to
        assert kept() == {("a", 1), ("a", 2)}
        assert await tiny.answer("a") == first
