"""Versions that live on: rolled back, addressed, copied aside and brought back, over a real engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError
from adapters_core.layers.module_weights import ModuleWeights
from server.adapters.copies import FilesCopy, files_bytes
from server.adapters.errors import (
    AdaptersWithModelError,
    BaseIsFusedError,
    NoPreviousVersionError,
    UnknownModelError,
    UnknownVersionError,
    VersionGoneError,
    VersionNotKeptError,
)
from server.adapters.folder import AdapterFolder
from server.adapters.keeping.private import PrivateFolder
from server.adapters.names import Name, checkpoint_of, parse_name
from server.adapters.paging.reading import MAX_LOADS
from server.adapters.source import Made
from server.adapters.versions import Entry
from tests.adapters.support import House, Site, answer_of, house, in_memory, read_model, tokens_of, turns
from tests.adapters.test_paging import Watched
from tests.models import make_adapter


def rewrite(model_path: Path, folder: Path, seed: int) -> list[int]:
    """Another adapter in the folder; returns what mlx-lm answers with it."""
    make_adapter(folder, read_model(model_path), seed=seed)
    return answer_of(model_path, folder)


def weights_of(model_path: Path, folder: Path) -> dict[str, ModuleWeights]:
    """What the adapter in a folder brings to each module, as if it had been made."""
    return AdapterContainer.from_directory(folder).check(read_model(model_path))


async def replace(house: House, name: str = "a") -> Entry:
    return (await house.service.load(name, replace=True)).entry


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a", Name("a")),
        ("a@2", Name("a", 2)),
        ("a@step-100", Name("a@step-100")),
        ("a@step-0@12", Name("a@step-0", 12)),
        *((wrong, None) for wrong in (
            "a@", "a@0", "a@02", "a@-1", "a@x", "@2", "a@2@3", "a@step-", "a@step-01", "a@step-x", "base@2",
            "a@step-1@step-2", "a @2", "a@2\n", "default@1", "a@1234567890", "",
        )),
    ],
)  # fmt: skip
def test_what_a_name_says(text: str, name: Name | None) -> None:
    assert parse_name(text, "base") == name
    if name is not None and (checkpoint := checkpoint_of(name.entry)) is not None:
        assert str(checkpoint) == name.entry


async def test_a_rollback_brings_the_previous_version_back_and_can_itself_be_rolled_back(
    model_path: Path, own_root: Path, expected: dict[str, list[int]]
) -> None:
    async with house(model_path, own_root) as tiny:
        await tiny.service.load("a", pinned=True, activate=True)
        first = tiny.service.registry.get("a").current
        with pytest.raises(NoPreviousVersionError):
            await tiny.service.roll_back("a")
        second_answer = rewrite(model_path, own_root / "a", 50)
        entry = await replace(tiny)
        assert await tiny.answer("a") == second_answer

        pin = await tiny.service.resolve("a")
        assert await tiny.service.roll_back("a") is entry
        assert (entry.current, entry.current.number, entry.pinned) == (first, 1, True)
        assert await tiny.answer("a") == await tiny.answer(None) == expected["a"]
        assert await tokens_of(tiny.generate(pin)) == second_answer

        await tiny.service.roll_back("a")
        assert (entry.current.number, await tiny.answer("a")) == (2, second_answer)
        await tiny.service.roll_back("a")

        third_answer = rewrite(model_path, own_root / "a", 51)
        await replace(tiny)
        assert (entry.current.number, await tiny.answer("a")) == (3, third_answer)
        await tiny.service.roll_back("a")
        assert (entry.current.number, await tiny.answer("a")) == (1, expected["a"])
        assert await tiny.residents() == 2
        await tiny.service.unload("a")
        assert (await tiny.residents(), tiny.service.keeper.bytes_held) == (0, 0)


async def test_versions_are_addressed_while_they_live(
    model_path: Path, own_root: Path, expected: dict[str, list[int]]
) -> None:
    async with house(model_path, own_root) as tiny:
        for name in ("a@1", "a@step-5"):
            with pytest.raises(UnknownModelError):
                await tiny.service.resolve(name)
        await tiny.service.load("a")
        answers = {1: expected["a"]}
        for number in (2, 3):
            answers[number] = rewrite(model_path, own_root / "a", 60 + number)
            await replace(tiny)
        for name in ("a@2", "tiny:a@2"):
            assert await tiny.answer(name) == answers[2]
        assert await tiny.answer("a@3") == await tiny.answer(None, [("a@3", 1.0)]) == answers[3]
        with pytest.raises(UnknownVersionError, match=r"no version 1, or has it no more.*'a@3', 'a@2'"):
            await tiny.service.resolve("a@1")
        with pytest.raises(UnknownVersionError) as raised:
            await tiny.service.resolve(None, [("a", 0.5), ("a@9", 0.5)])
        assert raised.value.param == "adapters"
        with pytest.raises(AdaptersWithModelError):
            await tiny.service.resolve("a@2", [("a", 1.0)])

        pin = await tiny.service.resolve(None, [("a@2", 0.5), ("a", 0.25)])
        entry = tiny.service.registry.get("a")
        assert entry.previous is not None
        weights = {resident.digest: weight for resident, weight in pin.row}
        assert weights == {entry.previous.resident.digest: 0.5, entry.current.resident.digest: 0.25}
        assert (pin.served_name, entry.in_flight) == ("tiny", 2)
        pin.release()
        pin = await tiny.service.resolve("tiny:a@2")
        assert pin.served_name == "a@2"
        pin.release()


async def test_a_version_that_left_memory_comes_back_although_its_folder_holds_another(
    model_path: Path, own_root: Path, equal_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    async with house(model_path, own_root, memory_bytes=size_bytes) as tight:
        await tight.answer("a")
        second = rewrite(model_path, own_root / "a", 70)
        entry = await replace(tight)  # there is room for one: the old version left for it
        assert entry.previous is not None
        assert (entry.previous.in_memory, entry.previous.kept) == (False, True)
        hits = await tight.engine.container.perform(lambda context: context.prompt_cache.stats.hits)
        assert await tight.answer("a@1") == expected["a"]
        assert await tight.engine.container.perform(lambda c: c.prompt_cache.stats.hits) == hits + 1
        assert not entry.current.in_memory
        assert await tight.answer("a") == second
        await tight.service.roll_back("a")
        assert entry.current.in_memory
        assert await tight.answer("b") == expected["b"]
        assert await tight.answer("a") == expected["a"]  # from its copy, though it is the current one
        assert entry.current.number == 1
        await tight.service.fuse("a", "auto", unload_others=True)  # the files that were loaded
        assert await tight.answer("tiny") == expected["a"]


async def test_what_waits_for_room_is_rolled_back_in_its_turn(
    model_path: Path, own_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    async with house(model_path, own_root, memory_bytes=size_bytes) as tight:
        await tight.answer("a")
        second = rewrite(model_path, own_root / "a", 71)
        entry = await replace(tight)
        pin = await tight.service.resolve("a")
        rolling = asyncio.create_task(tight.service.roll_back("a"))
        request = asyncio.create_task(tight.answer("a@1"))
        for _ in range(10):
            await tight.engine.container.perform(lambda context: None)
        assert (rolling.done(), entry.current.number) == (False, 2)
        assert await tokens_of(tight.generate(pin)) == second
        await rolling
        assert (entry.current.number, await request) == (1, expected["a"])


async def test_without_room_for_copies_nothing_is_kept_and_the_last_that_lives_is_what_is_rolled_back_to(
    model_path: Path, own_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    async with house(model_path, own_root, kept_bytes=0) as tiny:
        await tiny.service.load("a")
        rewrite(model_path, own_root / "a", 80)
        entry = await replace(tiny)
        await tiny.until(lambda: not entry.retired)
        with pytest.raises(NoPreviousVersionError):
            await tiny.service.roll_back("a")
        with pytest.raises(UnknownVersionError):
            await tiny.service.resolve("a@1")
        assert await tiny.residents() == 1
    kept_bytes = int(1.5 * files_bytes(AdapterFolder(own_root / "b", "b")))
    async with house(model_path, own_root, memory_bytes=size_bytes, kept_bytes=kept_bytes) as tight:
        for name in ("b", "c"):  # two copies do not fit: what the folders still hold goes, then the older
            await tight.service.load(name)
            rewrite(model_path, own_root / name, 81)
            await replace(tight, name)
        assert tight.service.registry.get("b").previous is None
        assert tight.service.registry.get("c").previous is not None
        assert 0 < tight.service.keeper.bytes_held <= kept_bytes
        # The second version of b is out of memory when its folder changes: nothing has it any more.
        answer = rewrite(model_path, own_root / "b", 82)
        assert await tight.answer("b") == answer
        assert tight.service.registry.get("b").current.number == 3
        with pytest.raises(NoPreviousVersionError):
            await tight.service.roll_back("b")
        assert await tight.answer("c@1") == expected["c"]


async def test_another_folder_keeps_what_is_out_of_memory(
    model_path: Path, own_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    async with house(model_path, own_root, memory_bytes=size_bytes) as tight:
        for name in ("a", "b"):
            await tight.answer(name)
        entry = (await tight.service.load("a", "c", replace=True)).entry
        assert await tight.answer("a") == expected["c"]
        rewrite(model_path, own_root / "a", 83)
        await tight.service.roll_back("a")
        assert (entry.current.number, await tight.answer("a")) == (1, expected["a"])


async def test_a_replacement_that_fails_leaves_only_the_copy_of_what_is_served(
    model_path: Path, own_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    async with house(model_path, own_root, memory_bytes=2 * size_bytes, wait_seconds=0) as tight:
        await tight.answer("a")
        entry = tight.service.registry.get("a")
        (own_root / "a" / "adapters.safetensors").write_bytes(b"damaged")
        with pytest.raises(InvalidAdapterError):
            await replace(tight)
        pins = [await tight.service.resolve(name) for name in ("a", "b")]
        rewrite(model_path, own_root / "a", 90)
        with pytest.raises(Exception, match="would take"):
            await replace(tight)
        for pin in pins:
            pin.release()
        kept = [tight.service.registry.get(name).current.copy for name in ("a", "b")]
        assert tight.service.keeper.bytes_held == sum(copy.size_bytes for copy in kept if copy)
        assert (entry.previous, entry.newest.number) == (None, 1)
        assert await tight.answer("a") == expected["a"]


async def test_a_copy_that_has_gone_is_said_so_and_the_current_version_stays(
    model_path: Path, own_root: Path, size_bytes: int, tmp_path: Path
) -> None:
    async with house(model_path, own_root, memory_bytes=size_bytes, kept_dir=tmp_path / "kept") as tight:
        await tight.answer("a")
        second = rewrite(model_path, own_root / "a", 91)
        entry = await replace(tight)
        assert entry.previous is not None
        assert isinstance(entry.previous.copy, FilesCopy)
        copy = entry.previous.copy.folder.path / "adapters.safetensors"
        content = copy.read_bytes()
        copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(VersionGoneError):
            await tight.service.roll_back("a")
        assert (entry.current.number, entry.previous, await tight.answer("a")) == (2, None, second)
        with pytest.raises(NoPreviousVersionError):
            await tight.service.roll_back("a")


async def test_what_was_made_in_memory_comes_back_from_its_copy_and_is_refused_without_one(
    model_path: Path, own_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    made, weights = Made({"method": "test"}), weights_of(model_path, own_root / "e")
    async with house(model_path, own_root, memory_bytes=size_bytes) as tight:
        loaded = await tight.service.load_made("blend", made, weights, activate=True)
        assert (loaded.created, loaded.entry.current.source) == (True, made)
        for name in ("a", "blend", "b", "blend"):
            assert await tight.answer(name) == expected["e" if name == "blend" else name]
        assert in_memory(tight) == ["blend"]
        loaded = await tight.service.load_made(
            "a", made, weights_of(model_path, own_root / "b"), replace=True
        )
        assert (loaded.created, loaded.entry.current.number) == (False, 2)
        assert await tight.answer("a") == expected["b"]
        await tight.service.roll_back("a")
        assert await tight.answer("a") == expected["a"]
        # Nobody can make it again, but it was kept.
        await tight.service.fuse("blend", "auto", unload_others=True)
        assert await tight.answer("tiny") == expected["e"]
        await tight.service.unfuse("blend")
        assert await tight.answer("blend") == expected["e"]
        await tight.service.load("b")
        await tight.service.fuse("b", "auto", unload_others=True)
        kept = tight.service.registry.get("b").current.copy
        assert kept is not None
        assert tight.service.keeper.bytes_held == kept.size_bytes
        with pytest.raises(BaseIsFusedError):
            await tight.service.roll_back("b")
        with pytest.raises(BaseIsFusedError):
            await tight.service.resolve("blend")
        await tight.service.unfuse("b")
    async with house(model_path, own_root, kept_bytes=0) as tiny:
        with pytest.raises(VersionNotKeptError):
            await tiny.service.load_made("blend", made, weights)
        assert (tiny.service.registry.entries, await tiny.residents()) == ([], 0)


async def test_a_made_version_comes_after_one_that_a_request_found_meanwhile(
    model_path: Path, own_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    async with house(model_path, own_root, memory_bytes=2 * size_bytes) as tight:
        reading = tight.service._finder._placer.reader.turns
        for name in ("a", "b", "c"):
            await tight.answer(name)
        for _ in range(MAX_LOADS):
            await reading.acquire()  # from now on one load at a time gets on, when it is let
        made, weights = Made({"method": "test"}), weights_of(model_path, own_root / "e")
        replacing = asyncio.create_task(tight.service.load_made("a", made, weights, replace=True))
        await turns(tight, 30)
        reading.release()
        await reading.acquire()  # what was made has been checked
        await turns(tight, 30)
        found = rewrite(model_path, own_root / "a", 93)
        request = asyncio.create_task(tight.answer("a"))
        await turns(tight, 30)
        reading.release()
        await reading.acquire()  # version 1 has been kept; then the request came before what was made
        assert await request == found
        assert tight.service.registry.get("a").current.number == 2
        assert not replacing.done()
        for _ in range(MAX_LOADS):
            reading.release()
        assert (await replacing).entry.current.number == 3
        assert await tight.answer("a") == expected["e"]
        assert (await tight.service.roll_back("a")).current.number == 2
        assert await tight.answer("a") == found


async def test_a_replacement_that_fails_at_the_last_moment_leaves_what_rollbacks_need(
    model_path: Path, own_root: Path, size_bytes: int
) -> None:
    async with house(model_path, own_root, memory_bytes=size_bytes, wrap=Watched) as tight:
        container = tight.container
        assert isinstance(container, Watched)
        first = await tight.answer("a")
        await tight.answer("b")
        entry = tight.service.registry.get("a")
        version = entry.current
        found = rewrite(model_path, own_root / "a", 94)
        assert await tight.answer("a") == found
        container.refuses = True
        weights = weights_of(model_path, own_root / "e")
        for work in (
            tight.service.load_made("a", Made({"method": "test"}), weights, replace=True),
            tight.service.load("a", "e", replace=True),
        ):
            with pytest.raises(RuntimeError, match="no memory"):
                await work
        container.refuses = False
        assert (entry.current.number, entry.previous, version.kept) == (2, version, True)
        copies = [each.copy.size_bytes for each in tight.service.registry.versions if each.copy]
        assert (len(copies), tight.service.keeper.bytes_held) == (3, sum(copies))
        await tight.service.roll_back("a")
        assert await tight.answer("a") == first


async def test_copies_go_with_the_server_and_those_of_a_dead_one_with_the_next(
    model_path: Path, own_root: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    dead = kept / f"versions-{'0' * 32}"
    dead.mkdir(parents=True)
    (dead / "lock").touch()
    (dead / "0.safetensors").write_bytes(b"x")
    async with house(model_path, own_root, kept_dir=kept) as tiny:
        await tiny.answer(None)
        assert dead.exists()  # nothing is touched before it is needed
        await tiny.service.load("a")
        other = PrivateFolder(kept)
        assert other.path().parent == kept
        assert len(list(kept.iterdir())) == 2
        other.close()
        assert len(list(kept.iterdir())) == 1
    assert list(kept.iterdir()) == []


async def test_a_rollback_by_a_call(tiny_site: Site, model_path: Path) -> None:
    await tiny_site.call("POST", "/v1/adapters", {"id": "a"}, status=201)
    for path, status, code in (
        ("a/rollback", 409, "no_previous_version"),
        ("x/rollback", 404, "adapter_not_found"),
    ):
        await tiny_site.refused("POST", f"/v1/adapters/{path}", None, status, code)
    first = await tiny_site.says("a")
    rewrite(model_path, tiny_site.root / "a", 9)
    body = {"id": "a", "replace": True}
    replaced = await tiny_site.call("POST", "/v1/adapters", body)
    told = [(each["version"], each["state"]) for each in replaced["versions"]]
    assert told == [(1, "previous"), (2, "current")]
    assert replaced["versions"][1]["digest"] == replaced["digest"]
    reply = await tiny_site.chat("tiny:a@1")
    assert (reply["model"], reply["choices"][0]["message"]["content"]) == ("a@1", first)
    assert await tiny_site.says(None, adapters=[{"id": "a@1", "weight": 1.0}]) == first
    assert await tiny_site.says("a") != first
    error = (await tiny_site.chat("a@3", status=404))["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'a@2', 'a@1'" in error["message"]

    back = await tiny_site.call("POST", "/v1/adapters/a/rollback")
    assert (back["version"], back["resident"], back["digest"]) == (1, True, replaced["versions"][0]["digest"])
    assert [each["state"] for each in back["versions"]] == ["current", "previous"]
    assert await tiny_site.says("a") == first
    await tiny_site.refused("POST", "/v1/adapters", {"id": "a@1"}, 400, "invalid_adapter_id")
