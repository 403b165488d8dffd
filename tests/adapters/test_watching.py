"""A watched adapters root: what is written there is served when it is whole, and not a moment before."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from server.adapters.errors import AdapterChangingError, UnknownModelError
from server.adapters.folder import AdapterFolder
from server.adapters.looks import Rest, look_at, unchanged_seconds
from server.errors import to_api_error
from tests.adapters.support import House, answer_of, house, in_memory, read_model, site
from tests.models import make_adapter

SETTLE_SECONDS = 0.15
PAUSE_SECONDS = 0.1
"""Between the pieces of a slow write."""


@pytest.fixture
def watched_root(tmp_path: Path) -> Path:
    root = tmp_path / "watched"
    root.mkdir()
    return root


@asynccontextmanager
async def watching(model_path: Path, root: Path, **options: Any) -> AsyncIterator[House]:
    """A house that watches `root`, with nothing loaded by a call."""
    options = {"watched_dir": root, "settle_seconds": SETTLE_SECONDS, **options}
    async with house(model_path, root, **options) as tiny:
        await tiny.service.start([])
        yield tiny


async def until(condition: Callable[[], bool]) -> None:
    """Give the watch its time; it cannot say that it has nothing to do."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("expected it to become so within 20 s")


async def nothing_happens() -> None:
    await asyncio.sleep(4 * SETTLE_SECONDS)


def number(tiny: House, name: str) -> int:
    """The current version of an adapter; 0 if it is not registered."""
    entry = tiny.service.registry.find(name)
    return 0 if entry is None else entry.current.number


def events(logs: list[Any], event: str) -> list[Any]:
    return [line for line in logs if line["event"] == event]


async def write_in_pieces(source: Path, target: Path, pieces: int = 4) -> None:
    """Write an adapter as a slow trainer would: the config, then its weights bit by bit."""
    await asyncio.to_thread(target.mkdir, exist_ok=True)
    shutil.copy(source / "adapter_config.json", target / "adapter_config.json")
    content = await asyncio.to_thread((source / "adapters.safetensors").read_bytes)
    size = -(-len(content) // pieces)
    with (target / "adapters.safetensors").open("wb") as file:
        for start in range(0, len(content), size):
            file.write(content[start : start + size])
            file.flush()
            await asyncio.sleep(PAUSE_SECONDS)


async def test_what_is_written_becomes_an_adapter_and_its_next_version(
    model_path: Path, watched_root: Path, equal_root: Path, expected: dict[str, list[int]]
) -> None:
    # The writer's pauses are a tenth of it, so that a busy machine does not make them as long.
    async with watching(model_path, watched_root, settle_seconds=10 * PAUSE_SECONDS) as tiny:
        registry = tiny.service.registry
        with capture_logs() as logs:
            writing = asyncio.create_task(write_in_pieces(equal_root / "a", watched_root / "x"))
            while not writing.done():
                assert registry.entries == []
                with pytest.raises(UnknownModelError):  # nor does a request get it half-written
                    await tiny.service.resolve("x")
                await asyncio.sleep(PAUSE_SECONDS / 2)
            await until(lambda: number(tiny, "x") == 1)
            assert in_memory(tiny) == ["x"]
            assert await tiny.answer("x") == expected["a"]

            writing = asyncio.create_task(write_in_pieces(equal_root / "b", watched_root / "x"))
            while not writing.done():
                assert await tiny.answer("x") == expected["a"]
            await until(lambda: number(tiny, "x") == 2)
            assert await tiny.answer("x") == expected["b"]
            assert await tiny.answer("x@1") == expected["a"]
        assert not events(logs, "adapter_folder_broken")
        assert len(events(logs, "adapter_loaded")) == 2


async def test_what_was_rolled_back_comes_again_only_when_its_folder_holds_something_else(
    model_path: Path, watched_root: Path, equal_root: Path, expected: dict[str, list[int]]
) -> None:
    shutil.copytree(equal_root / "a", watched_root / "x")
    async with watching(model_path, watched_root) as tiny:
        await until(lambda: number(tiny, "x") == 1)
        shutil.copytree(equal_root / "b", watched_root / "x", dirs_exist_ok=True)
        await tiny.service.load("x", replace=True)  # sooner than the watch
        await tiny.service.roll_back("x")
        await nothing_happens()
        os.utime(watched_root / "x" / "adapters.safetensors")  # looks new, but is not
        await nothing_happens()
        assert (number(tiny, "x"), await tiny.answer("x")) == (1, expected["a"])
        shutil.copytree(equal_root / "a", watched_root / "x", dirs_exist_ok=True)
        await until(lambda: number(tiny, "x") == 3)  # what version 1 holds, but written anew
        shutil.copytree(equal_root / "c", watched_root / "x", dirs_exist_ok=True)
        await until(lambda: number(tiny, "x") == 4)
        assert await tiny.answer("x") == expected["c"]


async def test_a_broken_folder_is_logged_once_with_every_problem_and_tried_again_when_it_changes(
    model_path: Path, watched_root: Path, equal_root: Path, expected: dict[str, list[int]]
) -> None:
    folder = watched_root / "x"
    shutil.copytree(equal_root / "a", folder)
    async with watching(model_path, watched_root) as tiny:
        await until(lambda: number(tiny, "x") == 1)
        with capture_logs() as logs:
            (folder / "adapters.safetensors").write_bytes(b"no tensors")
            (folder / "adapter_config.json").write_text('{"fine_tune_type": "magic"}')
            await until(lambda: bool(events(logs, "adapter_folder_broken")))
            await nothing_happens()
            assert (number(tiny, "x"), await tiny.answer("x")) == (1, expected["a"])
            (line,) = events(logs, "adapter_folder_broken")
            assert line["adapter"] == "x"
            assert len(line["problems"]) >= 2
            shutil.copytree(equal_root / "b", folder, dirs_exist_ok=True)
            await until(lambda: number(tiny, "x") == 2)
        assert len(events(logs, "adapter_folder_broken")) == 1
        assert await tiny.answer("x") == expected["b"]


async def test_a_folder_that_goes_leaves_the_adapter_and_may_come_back(
    model_path: Path, watched_root: Path, equal_root: Path, expected: dict[str, list[int]]
) -> None:
    shutil.copytree(equal_root / "a", watched_root / "x")
    async with watching(model_path, watched_root) as tiny:
        await until(lambda: number(tiny, "x") == 1)
        with capture_logs() as logs:
            shutil.rmtree(watched_root / "x")
            await until(lambda: bool(events(logs, "adapter_folder_gone")))
        assert (number(tiny, "x"), await tiny.answer("x")) == (1, expected["a"])
        shutil.copytree(equal_root / "a", watched_root / "x")
        await nothing_happens()
        assert number(tiny, "x") == 1


async def test_what_a_call_unloaded_stays_so_and_what_a_call_loaded_is_watched_where_it_lies(
    model_path: Path, watched_root: Path, equal_root: Path, expected: dict[str, list[int]]
) -> None:
    shutil.copytree(equal_root / "a", watched_root / "x")
    shutil.copytree(equal_root / "b", watched_root / "deep" / "er")
    async with watching(model_path, watched_root) as tiny:
        await until(lambda: number(tiny, "x") == 1)
        await tiny.service.unload("x")
        await tiny.service.load("y", "deep/er", activate=True, pinned=True)
        shutil.copytree(equal_root / "c", watched_root / "x", dirs_exist_ok=True)
        shutil.copytree(equal_root / "e", watched_root / "deep" / "er", dirs_exist_ok=True)
        await until(lambda: number(tiny, "y") == 2)
        entry = tiny.service.registry.get("y")
        assert (entry.pinned, await tiny.answer("default")) == (True, expected["e"])
        assert tiny.service.registry.served == ["tiny", "y"]
        await tiny.service.load("x")
        assert await tiny.answer("x") == expected["c"]


async def test_what_nobody_asked_for_drives_nothing_out_of_memory(
    model_path: Path, watched_root: Path, equal_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    shutil.copytree(equal_root / "a", watched_root / "a")
    async with watching(model_path, watched_root, memory_bytes=size_bytes) as tight:
        await until(lambda: number(tight, "a") == 1)
        shutil.copytree(equal_root / "b", watched_root / "b")
        await until(lambda: number(tight, "b") == 1)
        assert in_memory(tight) == ["a"]
        assert await tight.answer("b") == expected["b"]
        assert in_memory(tight) == ["b"]
        make_adapter(watched_root / "a", read_model(model_path), seed=400)
        await until(lambda: number(tight, "a") == 2)
        assert in_memory(tight) == ["b"]
        assert await tight.answer("a") == answer_of(model_path, watched_root / "a")
        assert await tight.answer("a@1") == expected["a"]  # although it was out of memory by then


async def test_what_is_out_of_memory_and_being_written_is_what_it_was(
    model_path: Path, watched_root: Path, equal_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    for name in ("a", "b"):
        shutil.copytree(equal_root / name, watched_root / name)
    for kept_bytes in (1 << 30, 0):
        # It settles when this test is over.
        options = {"memory_bytes": size_bytes, "kept_bytes": kept_bytes, "load_on_demand": False}
        async with watching(model_path, watched_root, settle_seconds=600.0, **options) as tight:
            for name in ("a", "b"):
                await tight.service.load(name)
            assert in_memory(tight) == ["b"]
            weights = (watched_root / "a" / "adapters.safetensors").read_bytes()
            for content in (weights[:-100], weights[:-4] + bytes(4)):  # half of it, and another
                (watched_root / "a" / "adapters.safetensors").write_bytes(content)
                if kept_bytes:
                    assert await tight.answer("a") == expected["a"]
                    assert await tight.answer("b") == expected["b"]
                    continue
                with pytest.raises(AdapterChangingError) as raised:
                    await tight.service.resolve("a")
                assert "retry-after" in {name.lower() for name in to_api_error(raised.value).headers}
            assert number(tight, "a") == 1
            (watched_root / "a" / "adapters.safetensors").write_bytes(weights)
            assert await tight.answer("a") == expected["a"]


async def test_the_watch_outlives_its_root(
    model_path: Path, watched_root: Path, equal_root: Path, expected: dict[str, list[int]]
) -> None:
    shutil.rmtree(watched_root)
    with capture_logs() as logs:
        async with watching(model_path, watched_root, rescan_seconds=SETTLE_SECONDS) as tiny:
            await until(lambda: bool(events(logs, "adapters_root_not_watched")))
            shutil.copytree(equal_root / "a", watched_root / "x")
            await until(lambda: number(tiny, "x") == 1)  # found by a scan
            assert await tiny.answer("x") == expected["a"]


def test_a_look_tells_a_file_that_was_written_or_exchanged(tmp_path: Path, equal_root: Path) -> None:
    path = Path(shutil.copytree(equal_root / "a", tmp_path / "a"))
    folder, weights = AdapterFolder(path, "a"), path / "adapters.safetensors"
    looks = [look_at(folder)]
    (path / "notes.txt").write_text("not a part of the adapter")
    assert look_at(folder) == looks[0]
    status = weights.stat()
    other = path / "other"
    shutil.copy(weights, other)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, weights)  # same size and time, another file
    looks.append(look_at(folder))
    os.utime(weights)
    looks.append(look_at(folder))
    weights.unlink()
    looks.append(look_at(folder))
    assert len(set(looks)) == 4
    assert look_at(AdapterFolder(tmp_path / "nowhere", "x")) == ()


@pytest.mark.parametrize("given_seconds", [-86400.0, 0.0, 86400.0])
def test_a_file_that_was_just_copied_has_changed_whatever_time_it_was_given(
    tmp_path: Path, equal_root: Path, given_seconds: float
) -> None:
    path = Path(shutil.copytree(equal_root / "a", tmp_path / "a"))
    folder, given = AdapterFolder(path, "a"), time.time() + given_seconds
    before = look_at(folder)
    for name, *_ in before:
        os.utime(path / name, (given, given))
    first = unchanged_seconds(folder)
    assert 0 <= first < 60
    time.sleep(0.05)
    assert unchanged_seconds(folder) >= first + 0.04  # a time to come holds nothing up
    assert look_at(folder) != before


async def test_a_save_is_served_at_once_under_a_watch(tmp_path: Path, model_path: Path, root: Path) -> None:
    async with site(model_path, root, watch=True, watch_settle_seconds=3600, cache_dir=tmp_path) as started:
        await started.call("POST", "/v1/adapters", {"id": "a"}, status=201)
        expected = await started.says("a")
        for name in ("new", "newer"):
            await started.call("POST", "/v1/adapters/a/save", {"save_to": name})
            assert await started.says(name) == expected
        shutil.copytree(root / "a", root / "copied")  # by hand, so that it may be half there
        await started.chat("copied", status=404)


@pytest.mark.parametrize("ahead_seconds", [-3600, 3600])
def test_a_folder_has_settled_though_the_clock_was_set(
    tmp_path: Path, equal_root: Path, ahead_seconds: int
) -> None:
    folder = AdapterFolder(Path(shutil.copytree(equal_root / "a", tmp_path / "a")), "a")
    ahead_ns = ahead_seconds * 10**9
    look = tuple(
        (name, size, a + ahead_ns, b + ahead_ns, inode) for name, size, a, b, inode in look_at(folder)
    )
    rest = Rest()
    first = rest.seconds(folder, look)
    assert (first < 60) == (ahead_seconds > 0)
    time.sleep(0.05)
    assert rest.seconds(folder, look) >= first + 0.04
    if ahead_seconds > 0:
        assert rest.seconds(folder, (*look, look[0])) < 0.04  # it was written
