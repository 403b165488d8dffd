"""What goes wrong with private copies: nothing else is lost for it, and nothing is left over."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from adapters_core.bank import PreparedAdapter
from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError
from server.adapters.copies import FilesCopy, ModulesCopy, files_bytes
from server.adapters.errors import (
    AdapterMemoryError,
    UnknownModelError,
    VersionGoneError,
    VersionNotKeptError,
    VersionUnreadableError,
)
from server.adapters.folder import AdapterFolder
from server.adapters.keeping.private import PrivateFolder
from server.adapters.looks import unchanged_seconds
from server.adapters.paging.reading import MAX_LOADS
from server.adapters.source import Made
from tests.adapters.support import Held, House, answer_of, house, read_model, turns
from tests.adapters.test_paging import Watched
from tests.adapters.test_saving import no_large_files
from tests.models import make_adapter

MADE = Made({"method": "test"})


@contextmanager
def no_more_files() -> Iterator[None]:
    """This process can open nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def rewrite(model_path: Path, folder: Path, seed: int) -> list[int]:
    """Another adapter in the folder; returns what mlx-lm answers with it."""
    make_adapter(folder, read_model(model_path), seed=seed)
    return answer_of(model_path, folder)


async def make(tiny: House, model_path: Path, name: str, of: str) -> None:
    """Load `name`, made of what is in the folder `of`."""
    weights = AdapterContainer.from_directory(tiny.root / of).check(read_model(model_path))
    await tiny.service.load_made(name, MADE, weights)


def held_bytes(tiny: House) -> int:
    """Bytes of the copies of all that is registered."""
    versions = tiny.service.registry.versions
    return sum(version.copy.size_bytes for version in versions if version.copy)


def one_bytes(root: Path) -> int:
    return files_bytes(AdapterFolder(root / "a", "a"))


async def test_a_copy_that_cannot_be_read_for_now_stays(
    model_path: Path, own_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    async with house(model_path, own_root, memory_bytes=size_bytes) as tight:
        await make(tight, model_path, "made", "e")
        await tight.answer("a")
        rewrite(model_path, own_root / "a", 50)
        await tight.service.load("a", replace=True)
        for name in ("made", "a@1"):
            with no_more_files(), pytest.raises(VersionUnreadableError):
                await tight.service.resolve(name)
        assert await tight.answer("made") == expected["e"]
        assert await tight.answer("a@1") == expected["a"]


async def test_a_made_copy_that_was_written_over_is_given_up(
    model_path: Path, own_root: Path, size_bytes: int
) -> None:
    async with house(model_path, own_root, memory_bytes=size_bytes) as tight:
        for name, spoil in (("m", lambda path: path.write_bytes(b"damaged")), ("n", os.unlink)):
            await make(tight, model_path, name, "e")
            await tight.answer("a")
            version = tight.service.registry.get(name).current
            assert isinstance(version.copy, ModulesCopy)
            spoil(version.copy.file.path)
            with pytest.raises(VersionGoneError):
                await tight.answer(name)
            assert not version.kept
        assert tight.service.keeper.bytes_held == held_bytes(tight)


async def test_what_was_rolled_back_to_is_read_from_its_folder_if_its_copy_is_damaged(
    model_path: Path, own_root: Path, equal_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    async with house(model_path, own_root, memory_bytes=size_bytes) as tight:
        await tight.answer("a")
        rewrite(model_path, own_root / "a", 51)
        entry = (await tight.service.load("a", replace=True)).entry
        await tight.service.roll_back("a")
        await tight.answer("b")
        shutil.copytree(equal_root / "a", own_root / "a", dirs_exist_ok=True)
        assert isinstance(entry.current.copy, FilesCopy)
        (entry.current.copy.folder.path / "adapters.safetensors").write_bytes(b"damaged")
        assert await tight.answer("a") == expected["a"]
        assert (entry.current.number, entry.current.kept) == (1, False)


async def test_what_was_checked_is_what_becomes_the_next_version(
    model_path: Path, own_root: Path, size_bytes: int
) -> None:
    options = {"memory_bytes": size_bytes, "watched_dir": own_root, "settle_seconds": 0.2}
    async with house(model_path, own_root, rescan_seconds=600, load_on_demand=False, **options) as tight:
        for name in ("b", "a"):
            await tight.service.load(name)
        found = rewrite(model_path, own_root / "b", 52)
        folder = AdapterFolder(own_root / "b", "b")
        await tight.until(lambda: unchanged_seconds(folder) > 0.3)
        reading = tight.service._finder._placer.reader.turns
        for _ in range(MAX_LOADS - 1):
            await reading.acquire()  # other loads are under way
        request = asyncio.create_task(tight.answer("b"))
        for _ in range(1000):
            await asyncio.sleep(0)
            if tight.service.registry.get("b").current.loading:
                break
        await asyncio.sleep(0)
        await reading.acquire()  # and one more has been waiting for a turn
        config = folder.path / "adapter_config.json"
        content = config.read_text()
        config.write_text(content.replace('"scale": ', '"scale": 9'))  # a writer begins
        assert config.read_text() != content
        for _ in range(MAX_LOADS):
            reading.release()
        assert await request == found
        assert tight.service.registry.get("b").current.number == 2


async def test_what_is_written_while_a_request_waits_to_read_it_is_not_served(
    model_path: Path, own_root: Path
) -> None:
    options = {"watched_dir": own_root.parent / "nothing", "settle_seconds": 2.0}
    async with house(model_path, own_root, **options) as tiny:
        folders = [AdapterFolder(own_root / name, name) for name in ("b", "c")]
        await tiny.until(lambda: min(unchanged_seconds(folder) for folder in folders) > 2.2)
        reading = tiny.service._finder._placer.reader.turns
        for _ in range(MAX_LOADS):
            await reading.acquire()  # other loads are under way
        requests = [asyncio.create_task(tiny.service.resolve(folder.shown)) for folder in folders]
        await turns(tiny, 30)
        for folder, end in zip(folders, ("", "{"), strict=True):  # one is valid, one is not
            config = folder.path / "adapter_config.json"
            config.write_text(config.read_text() + end)
        for _ in range(MAX_LOADS):
            reading.release()
        for request in requests:
            with pytest.raises(UnknownModelError):
                await request


async def test_a_call_that_fails_costs_others_nothing(
    model_path: Path, own_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    options: dict[str, Any] = {"kept_bytes": int(1.5 * one_bytes(own_root)), "wait_seconds": 0}
    async with house(model_path, own_root, memory_bytes=2 * size_bytes, **options) as tight:
        service = tight.service
        await service.load("b")
        rewrite(model_path, own_root / "b", 53)
        await service.load("b", replace=True)
        previous = service.registry.get("b").previous
        await service.load("a")
        (own_root / "c" / "adapters.safetensors").write_bytes(b"damaged")
        for name, path in (("a", "c"), ("c", None)):
            with pytest.raises(InvalidAdapterError):
                await service.load(name, path, replace=True)
        pins = [await service.resolve(name) for name in ("a", "b")]
        with pytest.raises(AdapterMemoryError):
            await make(tight, model_path, "made", "e")
        with pytest.raises(AdapterMemoryError):
            await service.load("a", "e", replace=True)
        with pytest.raises(AdapterMemoryError):
            await service.roll_back("b")
        for pin in pins:
            pin.release()
        assert service.registry.get("b").previous is previous
        assert service.keeper.bytes_held == held_bytes(tight)
        await service.roll_back("b")
        assert await tight.answer("b") == expected["b"]


async def test_what_a_call_that_failed_gave_up_leaves_memory(model_path: Path, own_root: Path) -> None:
    kept_bytes = int(1.5 * one_bytes(own_root))
    async with house(model_path, own_root, kept_bytes=kept_bytes, wrap=Watched) as tiny:
        assert isinstance(tiny.container, Watched)
        service = tiny.service
        await service.load("b")
        rewrite(model_path, own_root / "b", 55)
        await service.load("b", replace=True)
        await service.load("a")
        tiny.container.refuses = True  # at the last moment, when a has been copied in the place of b@1
        with pytest.raises(RuntimeError, match="no memory"):
            await service.load("a", "c", replace=True)
        entry = service.registry.get("b")
        assert (entry.previous, service.registry.get("a").current.kept) == (None, True)
        await tiny.until(lambda: not entry.retired)
        await tiny.until(lambda: len(service.residency.versions) == 2)
        assert await tiny.residents() == 2


async def test_what_can_never_fit_is_not_copied(model_path: Path, own_root: Path, size_bytes: int) -> None:
    os.truncate(own_root / "c" / "adapters.safetensors", 1 << 26)  # sparse
    async with house(model_path, own_root, memory_bytes=size_bytes) as tight:
        with no_large_files(1 << 20), capture_logs() as logs:
            for work in (tight.answer("c"), tight.service.load("c")):
                with pytest.raises(AdapterMemoryError):
                    await work
        assert "version_not_kept" not in [line["event"] for line in logs]


async def test_what_is_refused_once_it_was_read_is_not_copied(model_path: Path, own_root: Path) -> None:
    async def accept(_: PreparedAdapter) -> None:
        raise LookupError("nothing new")

    async with house(model_path, own_root) as tiny:
        await tiny.service.load("a")
        folder = AdapterFolder(own_root / "a", "a")
        with no_large_files(1000), capture_logs() as logs, pytest.raises(LookupError):
            await tiny.service._load_watched("a", folder, accept)
        assert "version_not_kept" not in [line["event"] for line in logs]
        assert tiny.service.keeper.bytes_held == held_bytes(tiny) > 0


async def test_the_bound_holds_to_the_byte(model_path: Path, own_root: Path, size_bytes: int) -> None:
    async with house(model_path, own_root, kept_bytes=size_bytes + 100) as tiny:
        with pytest.raises(VersionNotKeptError):
            await make(tiny, model_path, "made", "e")
        assert (tiny.service.keeper.bytes_held, await tiny.residents()) == (0, 0)


async def test_files_go_on_another_thread_and_books_at_once(model_path: Path, own_root: Path) -> None:
    async with house(model_path, own_root) as tiny:
        await tiny.service.load("a")
        version = tiny.service.registry.get("a").current
        assert isinstance(version.copy, FilesCopy)
        path = version.copy.folder.path
        tiny.service.keeper.drop(version)
        assert (tiny.service.keeper.bytes_held, path.exists()) == (0, True)
        await tiny.until(lambda: not path.parent.exists())


async def test_a_full_disk_is_left_as_it_was(model_path: Path, own_root: Path, tmp_path: Path) -> None:
    async with house(model_path, own_root, kept_dir=tmp_path / "kept") as tiny:
        with no_large_files(1000):
            with pytest.raises(VersionNotKeptError):
                await make(tiny, model_path, "made", "e")
            await tiny.service.load("a")
        assert not tiny.service.registry.get("a").current.kept
        assert tiny.service.keeper.bytes_held == 0
        (folder,) = (tmp_path / "kept").iterdir()
        assert [file.name for file in folder.iterdir()] == ["lock"]


async def test_a_private_folder_that_was_removed_is_made_again(
    model_path: Path, own_root: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "versions-of-another-kind").write_text("no folder")
    async with house(model_path, own_root, kept_dir=kept) as tiny:
        await tiny.service.load("a")
        (folder,) = (path for path in kept.iterdir() if path.is_dir())
        shutil.rmtree(folder)
        for name in ("b", "c"):
            await tiny.service.load(name)
        assert not tiny.service.registry.get("a").current.kept
        (folder,) = (path for path in kept.iterdir() if path.is_dir())
        for lost in ("", "lock"):
            if lost:
                (folder / lost).unlink()
                await tiny.service.load("e")
            assert tiny.service.keeper.bytes_held == held_bytes(tiny)
            other = PrivateFolder(kept)
            other.path()
            other.close()
            copies = [tiny.service.registry.get(name).current.copy for name in ("b", "c")]
            assert all(isinstance(copy, FilesCopy) and copy.folder.path.is_dir() for copy in copies)
    assert [path.name for path in kept.iterdir()] == ["versions-of-another-kind"]


async def test_no_copy_waits_for_another(model_path: Path, own_root: Path) -> None:
    async with house(model_path, own_root, wrap=Held) as tiny:
        container = tiny.container
        assert isinstance(container, Held)
        await tiny.service.load("a")
        tiny.service.keeper.drop(tiny.service.registry.get("a").current)
        rewrite(model_path, own_root / "a", 54)
        container.holds_next = True
        replacing = asyncio.create_task(tiny.service.load("a", replace=True))
        try:
            async with asyncio.timeout(20):
                await container.reached.wait()  # what is replaced is being copied out of the bank
                await tiny.service.load("b")
            assert tiny.service.registry.get("b").current.kept
        finally:
            container.open.set()  # or the house could not close
        entry = (await replacing).entry
        assert entry.previous is not None
        assert tiny.service.keeper.bytes_held == held_bytes(tiny)
