"""Adapters that leave memory and come back, over a real engine: what is kept, and what is found again."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from adapters_core.bank import AdapterBank
from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError
from adapters_core.mixed.residents import ResidentAdapter
from adapters_core.mixed.routing import Routing
from server.adapters.errors import (
    AdapterMemoryError,
    AdapterNotFoundError,
    UnknownModelError,
)
from server.adapters.pins import Pin
from server.engine.container import ModelContainer
from server.engine.context import ModelContext
from tests.adapters.support import NAMES, House, answer_of, house, in_memory, read_model, tokens_of, turns
from tests.models import adapter_tensors, adapter_values, make_adapter, write_adapter


async def test_what_left_memory_comes_back_as_it_was(
    model_path: Path, equal_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    async with house(model_path, equal_root, memory_bytes=2 * size_bytes) as tight:
        registry, residency = tight.service.registry, tight.service.residency
        for name in ("a", "b", "a", "c"):
            assert await tight.answer(name) == expected[name]
        assert in_memory(tight) == ["a", "c"]  # b was the least recently used
        assert (residency.evictions, residency.cold_loads) == (1, 0)
        entry = registry.get("b")
        before = (entry.current.number, entry.current.resident.digest, entry.requests)
        assert registry.served == ["tiny", "a", "b", "c"]
        assert entry.state == "ready"

        hits = await tight.engine.container.perform(lambda context: context.prompt_cache.stats.hits)
        assert await tight.answer("b") == expected["b"]
        assert await tight.engine.container.perform(lambda c: c.prompt_cache.stats.hits) == hits + 1
        assert (entry.current.number, entry.current.resident.digest, entry.requests - 1) == before
        assert in_memory(tight) == ["b", "c"]
        assert (residency.evictions, residency.cold_loads) == (2, 1)
        assert await tight.residents() == 2


async def test_all_who_want_a_cold_adapter_share_one_load(
    model_path: Path, equal_root: Path, size_bytes: int
) -> None:
    async with house(model_path, equal_root, memory_bytes=size_bytes) as tight:
        for name in ("a", "b"):
            await tight.answer(name)
        waiters = [asyncio.create_task(tight.service.resolve("a")) for _ in range(20)]
        await asyncio.sleep(0)
        waiters[3].cancel()
        pins = await asyncio.gather(*waiters, return_exceptions=True)
        assert tight.service.residency.cold_loads == 1
        assert isinstance(pins.pop(3), asyncio.CancelledError)
        assert len({pin.row for pin in cast(list[Pin], pins)}) == 1
        assert tight.service.registry.get("a").in_flight == 19
        for pin in cast(list[Pin], pins):
            pin.release()
        assert tight.service.residency.committed_bytes == 0


async def test_another_content_is_another_version(model_path: Path, own_root: Path, size_bytes: int) -> None:
    async with house(model_path, own_root, memory_bytes=size_bytes) as tight:
        old = await tight.answer("a")
        entry = tight.service.registry.get("a")
        digest = entry.current.resident.digest
        await tight.answer("b")
        make_adapter(own_root / "a", read_model(model_path), seed=99)
        new = answer_of(model_path, own_root / "a")
        assert new != old
        requests, totals = entry.requests, tight.service.registry.totals["adapter"]
        cold_loads = tight.service.residency.cold_loads
        assert await asyncio.gather(*(tight.answer("a") for _ in range(3))) == [new] * 3
        assert entry.requests == requests + 3  # each once, though it was resolved again
        assert tight.service.registry.totals["adapter"] == totals + 3
        assert tight.service.residency.cold_loads == cold_loads  # nothing came back: that is new
        assert (entry.current.number, entry.current.resident.digest != digest) == (2, True)
        await turns(tight)
        keys = await tight.engine.container.perform(lambda context: context.prompt_cache.stats.entries)
        assert keys == 3  # those of b, of what a is now, and of what it was and can be again
        assert await tight.answer("a@1") == old

        # A larger one, which can never fit.
        await tight.answer("b")
        make_adapter(own_root / "a", read_model(model_path), seed=98, rank=16)
        assert await tight.answer("a") == new
        await tight.answer("b")
        tight.service.keeper.drop(entry.current)
        with pytest.raises(AdapterMemoryError):
            await tight.answer("a")
        assert (entry.current.number, tight.service.registry.in_flight) == (2, 0)


async def test_an_adapter_whose_folder_has_gone_is_what_it_was(
    model_path: Path, own_root: Path, size_bytes: int, tmp_path: Path, expected: dict[str, list[int]]
) -> None:
    async with house(model_path, own_root, memory_bytes=size_bytes) as tight:
        for name in ("a", "b"):
            await tight.answer(name)
        folder = own_root / "a"
        folder.rename(tmp_path / "elsewhere")
        spoils: list[tuple[Callable[[], Any], str]] = [
            (lambda: None, "no folder"),
            (lambda: folder.symlink_to(tmp_path / "elsewhere"), "outside the adapters root"),
            (lambda: (folder.unlink(), shutil.copytree(tmp_path / "elsewhere", folder)), ""),
            (lambda: (folder / "adapters.safetensors").write_bytes(b"damaged"), "cannot be used"),
            (lambda: os.truncate(folder / "adapters.safetensors", 1 << 40), "would take"),
            (lambda: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
        ]
        for spoil, reason in spoils:
            spoil()
            with capture_logs() as logs:
                assert await tight.answer("a") == expected["a"]
            told = [line["reason"] for line in logs if line["event"] == "adapter_read_from_copy"]
            assert len(told) == bool(reason)
            assert all(reason in each for each in told)
            assert await tight.answer("b") == expected["b"]
        assert tight.service.registry.get("a").current.number == 1


async def test_without_a_copy_an_adapter_whose_folder_has_gone_stays_registered(
    model_path: Path, own_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    async with house(model_path, own_root, memory_bytes=size_bytes, kept_bytes=0) as tight:
        for name in ("a", "b"):
            await tight.answer(name)
        (own_root / "a").rename(own_root / "elsewhere")
        with pytest.raises(AdapterNotFoundError):
            await tight.answer("a")
        shutil.copytree(own_root / "elsewhere", own_root / "a")
        (own_root / "a" / "adapters.safetensors").write_bytes(b"damaged")
        results = await asyncio.gather(*(tight.answer("a") for _ in range(3)), return_exceptions=True)
        assert {type(result) for result in results} == {InvalidAdapterError}
        assert await tight.answer("b") == expected["b"]
        shutil.rmtree(own_root / "a")
        (own_root / "elsewhere").rename(own_root / "a")
        assert await tight.answer("a") == expected["a"]
        assert tight.service.registry.get("a").current.number == 1


async def test_a_folder_that_now_leads_out_of_the_root_is_not_read(
    model_path: Path, own_root: Path, size_bytes: int, tmp_path: Path
) -> None:
    async with house(model_path, own_root, memory_bytes=size_bytes, kept_bytes=0) as tight:
        for name in ("a", "b"):
            await tight.answer(name)
        (own_root / "a").rename(tmp_path / "outside")
        (own_root / "a").symlink_to(tmp_path / "outside")
        with pytest.raises(Exception, match="outside the adapters root"):
            await tight.answer("a")


async def test_a_pinned_adapter_stays(
    model_path: Path, equal_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    async with house(model_path, equal_root, memory_bytes=2 * size_bytes) as tight:
        service = tight.service
        await service.load("a", pinned=True)
        for name in ("b", "c", "e"):
            assert await tight.answer(name) == expected[name]
        assert in_memory(tight) == ["a", "e"]
        await service.load("e", pinned=True, replace=True)
        for work in (service.resolve("b"), service.load("b", replace=True)):
            with pytest.raises(AdapterMemoryError):
                await work
        assert (await service.load("a", replace=True)).entry.pinned
        assert in_memory(tight) == ["a", "e"]
        await service.load("e", pinned=False, replace=True)
        assert await tight.answer("b") == expected["b"]
        assert in_memory(tight) == ["a", "b"]
        assert await tight.residents() == 2


async def test_calls_on_an_adapter_that_is_not_in_memory(
    model_path: Path, own_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    async with house(model_path, own_root, memory_bytes=size_bytes, load_on_demand=False) as tight:
        service = tight.service
        before = await tight.snapshot()
        await service.start(["a", "b", "c"])  # more than fits together
        assert in_memory(tight) == ["c"]
        assert (await service.swap("a")).active == "a"
        for name in ("default", "b", "default"):
            assert await tight.answer(name) == expected["a" if name == "default" else name]
        replaced = await service.load("b", replace=True)
        assert (replaced.entry.current.number, in_memory(tight)) == (2, ["b"])

        _, freed_bytes = await service.unload("c")
        assert freed_bytes == 0
        with pytest.raises(UnknownModelError):
            await service.resolve("c")

        base = await tight.answer("tiny")
        await service.fuse("a", "auto", unload_others=True)
        assert await tight.answer("tiny") == expected["a"]
        assert service.residency.bytes_held == 0
        await service.unfuse("a")
        assert (in_memory(tight), await tight.answer("a")) == (["a"], expected["a"])
        assert await tight.answer("tiny") == base
        await service.unload("a")
        assert await tight.snapshot() == before


class Watched(ModelContainer):
    """A real container; keeps what the bank took at most, and fails in the middle of an exchange if told."""

    def __init__(self, inner: ModelContainer) -> None:
        super().__init__(inner._post)
        self._inner = inner
        self.most_bytes = 0
        self.refuses = False
        self.removes_at_most: int | None = None

    async def update(self, fn: Callable[[ModelContext], Any], *, drain: bool = False) -> Any:
        return await self._inner.update(self._watch(fn), drain=drain)

    async def perform(self, fn: Callable[[ModelContext], Any]) -> Any:
        return await self._inner.perform(fn)

    def _watch(self, fn: Callable[[ModelContext], Any]) -> Callable[[ModelContext], Any]:
        def run(context: ModelContext) -> Any:
            bank = context.bank
            context.bank = cast(AdapterBank, Refusing(bank, self.removes_at_most)) if self.refuses else bank
            try:
                return fn(context)
            finally:
                context.bank = bank
                held = sum(resident.size_bytes for resident in bank.residents)
                self.most_bytes = max(self.most_bytes, held)

        return run


class Refusing:
    """A bank that gives, perhaps only so many times, and does not take."""

    def __init__(self, bank: AdapterBank, removes_at_most: int | None) -> None:
        self._bank = bank
        self._removes_left = removes_at_most

    @property
    def residents(self) -> frozenset[ResidentAdapter]:
        return self._bank.residents

    def remove(self, resident: ResidentAdapter) -> int:
        if self._removes_left is not None:
            if not self._removes_left:
                raise RuntimeError("no memory")
            self._removes_left -= 1
        return self._bank.remove(resident)

    def add(self, prepared: object) -> None:
        raise RuntimeError("no memory")


async def test_a_load_that_fails_at_the_last_moment_loses_nothing(
    model_path: Path, equal_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    async with house(model_path, equal_root, memory_bytes=size_bytes, wrap=Watched) as tight:
        assert isinstance(tight.container, Watched)
        assert await tight.answer("a") == expected["a"]
        tight.container.refuses = True
        for work in (tight.answer("b"), tight.service.load("c")):
            with pytest.raises(RuntimeError, match="no memory"):
                await work
        assert tight.service.residency.committed_bytes == 0
        tight.container.refuses = False
        for name in ("a", "b", "c"):
            assert await tight.answer(name) == expected[name]
        assert tight.container.most_bytes <= size_bytes


async def test_an_exchange_that_fails_midway_leaves_what_is_there_in_the_books(
    model_path: Path, equal_root: Path, own_root: Path, size_bytes: int, expected: dict[str, list[int]]
) -> None:
    make_adapter(own_root / "e", read_model(model_path), seed=5, rank=8)
    async with house(model_path, own_root, memory_bytes=2 * size_bytes, wrap=Watched) as tight:
        assert isinstance(tight.container, Watched)
        for name in ("a", "b"):
            await tight.answer(name)
        tight.container.refuses, tight.container.removes_at_most = True, 1
        with pytest.raises(RuntimeError, match="no memory"):
            await tight.answer("e")  # both have to leave for it, and one does
        assert in_memory(tight) == ["b"]
        assert await tight.residents() == 1
        assert tight.service.residency.bytes_held == size_bytes
        tight.container.refuses = False
        for name in ("b", "a"):
            assert await tight.answer(name) == expected[name]
        assert await tight.answer("e") == answer_of(model_path, own_root / "e")


async def test_a_file_that_can_never_fit_is_not_read(
    model_path: Path, own_root: Path, size_bytes: int
) -> None:
    async with house(model_path, own_root, memory_bytes=size_bytes, kept_bytes=0) as tight:
        for name in ("a", "b"):
            await tight.answer(name)
        for name in ("a", "c"):
            os.truncate(own_root / name / "adapters.safetensors", 1 << 40)  # sparse; more than any memory
        for work in (tight.answer("a"), tight.answer("c"), tight.service.load("c")):
            with pytest.raises(AdapterMemoryError):
                await work
        assert tight.service.residency.committed_bytes == 0


@given(
    names=st.lists(
        st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True), min_size=4, max_size=16
    ),
    fits=st.integers(2, 3),
    seed=st.integers(0, 2**16),
)
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_requests_at_once_stay_within_the_budget_and_get_what_they_name(
    model_path: Path,
    equal_root: Path,
    size_bytes: int,
    expected: dict[str, list[int]],
    names: list[list[str]],
    fits: int,
    seed: int,
) -> None:
    limit_bytes = fits * size_bytes

    async def ask(tight: House, wanted: list[str], hold_turns: int) -> None:
        terms = [(name, 1.0 / len(wanted)) for name in wanted]
        pin = await tight.service.resolve(None, terms)
        entries = [tight.service.registry.get(name) for name in wanted]
        digests = {entry.current.resident.digest for entry in entries}
        assert {resident.digest for resident, _ in pin.row} == digests
        assert {resident for resident, _ in pin.row} <= await tight.bank()
        await turns(tight, hold_turns)
        assert {resident for resident, _ in pin.row} <= await tight.bank()
        tokens = await tokens_of(tight.generate(pin))
        if len(wanted) == 1:
            assert tokens == expected[wanted[0]]

    async def run() -> None:
        draw = random.Random(seed)
        async with house(model_path, equal_root, memory_bytes=limit_bytes, wrap=Watched) as tight:
            assert isinstance(tight.container, Watched)
            async with asyncio.timeout(60):
                await asyncio.gather(*(ask(tight, wanted, draw.randrange(5)) for wanted in names))
            assert tight.container.most_bytes <= limit_bytes
            assert tight.service.residency.committed_bytes == 0
            here = {
                entry.current.resident for entry in tight.service.registry.entries if entry.current.in_memory
            }
            assert await tight.bank() == here

    asyncio.run(run())


async def test_a_thousand_adapters_in_the_room_of_a_few(model_path: Path, tmp_path: Path) -> None:
    model = read_model(model_path)
    values = adapter_values(num_layers=1, keys=["self_attn.q_proj"])
    root = tmp_path / "many"
    first = write_adapter(root / "n0", values, adapter_tensors(model, values))
    for number in range(1, 1000):
        scaled = adapter_values(num_layers=1, keys=["self_attn.q_proj"], scale=2.0 + number / 100)
        folder = write_adapter(root / f"n{number}", scaled, None)
        os.link(first / "adapters.safetensors", folder / "adapters.safetensors")
    one_bytes = (
        AdapterBank(model, Routing()).prepare(AdapterContainer.from_directory(first)).resident.size_bytes
    )
    async with house(model_path, root, memory_bytes=8 * one_bytes, wrap=Watched) as tight:
        assert isinstance(tight.container, Watched)
        for number in range(0, 1000, 20):
            batch = [tight.service.resolve(f"n{each}") for each in range(number, number + 8)]
            for pin in await asyncio.gather(*batch):
                pin.release()
            for each in range(number + 8, number + 20):
                (await tight.service.resolve(f"n{each}")).release()
        registry = tight.service.registry
        assert len(registry.entries) == 1000
        assert len({entry.current.resident.digest for entry in registry.entries}) == 1000
        assert len(in_memory(tight)) == await tight.residents() == 8
        for number in (0, 999, 500, 7):
            assert await tight.answer(f"n{number}") == answer_of(model_path, root / f"n{number}")
            digest = AdapterContainer.from_directory(root / f"n{number}").digest
            assert registry.get(f"n{number}").current.resident.digest == digest
        assert tight.container.most_bytes <= 8 * one_bytes
