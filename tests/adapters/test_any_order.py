"""Any sequence of calls, some of them wrong: names, bank and answers agree, and nothing is left over."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from adapters_core.blending.blend import BlendOptions
from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError, InvalidBlendError
from server.adapters.blended import Blended
from server.adapters.blending import Blender
from server.adapters.errors import AdapterMemoryBusyError, AdapterMemoryError, LifeCycleError
from server.adapters.folder import AdapterFolder
from server.adapters.pins import Pin
from server.adapters.versions import Version
from tests.adapters.support import House, answer_of, greedy, house, read_model, tokens_of

FOLDERS = ["a", "b", "d", "broken", "nowhere"]
IDS = ["a", "b", "d"]


class AnyOrder(RuleBasedStateMachine):
    """Runs each rule to its end on one event loop, with requests held across the rules."""

    model_path: Path
    contents: Path
    """Folders with adapters, which stay as they are."""
    expected: dict[str, list[int]]
    """What mlx-lm answers with each content, by its digest; "" is the base alone."""
    memory_bytes: int
    refusals: set[str]
    """The kinds of errors that were met."""
    met: Counter[str]
    """How often what is rare has happened."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        root = Path(shutil.copytree(self.contents, Path(self.folder.name) / "adapters"))
        self.loop = asyncio.new_event_loop()
        self.stack = AsyncExitStack()
        started = house(
            self.model_path,
            root,
            memory_bytes=self.memory_bytes,
            wait_seconds=0,
            unload_timeout_seconds=0,
            load_on_demand=False,
        )
        self.house: House = self.run(self.stack.enter_async_context(started))
        self.blender = Blender(self.house.service)
        self.before = self.run(self.house.snapshot())
        self.held: list[tuple[Pin, str]] = []

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    def attempt(self, work: Any) -> None:
        try:
            self.run(work)
        except (LifeCycleError, InvalidAdapterError, InvalidBlendError) as error:
            self.refusals.add(type(error).__name__)

    def meaning(self, name: str) -> str:
        """The digest of what a name computes with now."""
        registry = self.house.service.registry
        name = registry.fused or (registry.active if name == "default" else name) or ""
        if not name or name == registry.base:
            return ""
        adapter_id, _, number = name.partition("@")
        entry = registry.get(adapter_id)
        named = [version for version in entry.named if number in ("", str(version.number))]
        return named[0].resident.digest

    @rule(
        name=st.sampled_from(IDS),
        folder=st.sampled_from(FOLDERS),
        activate=st.booleans(),
    )
    def load(self, name: str, folder: str, activate: bool) -> None:
        self.attempt(self.house.service.load(name, folder, activate=activate))

    @rule(name=st.sampled_from(IDS))
    def unload(self, name: str) -> None:
        self.attempt(self.house.service.unload(name))

    @precondition(lambda self: self.house.service.registry.entries)
    @rule(which=st.integers(0, 2), folder=st.sampled_from(IDS))
    def replace(self, which: int, folder: str) -> None:
        entries = self.house.service.registry.entries
        name = entries[which % len(entries)].id
        self.attempt(self.house.service.load(name, folder, replace=True))

    @rule(folder=st.sampled_from(IDS), content=st.sampled_from(["a", "b", "d", "broken", ""]))
    def write(self, folder: str, content: str) -> None:
        """A folder holds something else from now on, or is there no more."""
        shutil.rmtree(self.house.root / folder, ignore_errors=True)
        if content:
            shutil.copytree(self.contents / content, self.house.root / folder)

    @rule(name=st.sampled_from(IDS), part=st.sampled_from(IDS), version=st.sampled_from(["", "@1"]))
    def blend(self, name: str, part: str, version: str) -> None:
        registry, terms = self.house.service.registry, [(f"{part}{version}", 1.0)]
        entry = registry.find(part)
        living = [each for each in entry.named if version in ("", f"@{each.number}")] if entry else []
        self.attempt(self.blender.blend(name, terms, BlendOptions(), replace=True))
        made = registry.find(name)
        if living and made and isinstance(made.current.source, Blended):
            digest = living[0].resident.digest
            (source,) = made.current.source.parts
            if source.version.resident.digest == digest:
                self.expected.setdefault(made.current.resident.digest, self.expected[digest])
                AnyOrder.met["blend"] += 1

    @rule(which=st.integers(0, 2))
    def roll_back(self, which: int) -> None:
        entries = self.house.service.registry.entries
        name = [*(entry.id for entry in entries), *IDS][which]
        before = {entry.current for entry in entries}
        self.attempt(self.house.service.roll_back(name))
        AnyOrder.met["rollback"] += {entry.current for entry in entries} != before

    @rule(name=st.sampled_from([*IDS, None]), unload_previous=st.booleans())
    def swap(self, name: str | None, unload_previous: bool) -> None:
        self.attempt(self.house.service.swap(name, unload_previous))

    @rule(which=st.integers(0, 2), unload_others=st.booleans())
    def fuse(self, which: int, unload_others: bool) -> None:
        loaded = [entry.id for entry in self.house.service.registry.entries]
        name = [*loaded, *IDS][which]
        self.attempt(self.house.service.fuse(name, "auto", unload_others))
        entry = self.house.service.registry.find(name)
        if entry is not None and entry.state == "fused":
            kind = (
                "fused" if digest_in(entry.current) == entry.current.resident.digest else "fused from a copy"
            )
            AnyOrder.met[kind] += 1

    @rule(name=st.sampled_from(IDS))
    def unfuse(self, name: str) -> None:
        self.attempt(self.house.service.unfuse(name))

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        registry = self.house.service.registry
        older = [f"{entry.id}@{entry.previous.number}" for entry in registry.entries if entry.previous]
        names = [*registry.served, "default", *(older if registry.fused is None else [])]
        name = data.draw(st.sampled_from(names))
        try:
            pin = self.run(self.house.service.resolve(name))
        except (AdapterMemoryBusyError, AdapterMemoryError) as error:
            self.refusals.add(type(error).__name__)
            return
        self.held.append((pin, self.meaning(name)))  # now: its folder may have held something new

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        pin, folder = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        assert self.run(tokens_of(self.house.generate(pin))) == self.expected[folder]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def change_what_is_in_use(self, data: st.DataObject) -> None:
        service = self.house.service
        pin, _ = data.draw(st.sampled_from(self.held))
        works = [service.unload, service.unfuse, lambda name: service.fuse(name, "auto", True)]
        entry = service.registry.find(pin.served_name.partition("@")[0])
        if entry is not None and entry.in_flight:
            served = service.registry.served
            self.attempt(data.draw(st.sampled_from(works))(entry.id))
            assert service.registry.served == served

    @invariant()
    def agrees(self) -> None:
        registry = self.house.service.registry
        assert registry.in_flight == len(self.held)
        versions = [version for entry in registry.entries for version in entry.versions]
        here = {version.resident for version in versions if version.in_memory}
        assert not (registry.fused and here)
        assert all(version.in_memory for version in versions if version.pins) or registry.fused
        assert self.run(self.house.bank()) == here
        assert sum(resident.size_bytes for resident in here) <= self.memory_bytes
        assert all(version.kept for entry in registry.entries for version in entry.named[1:])
        assert all(version.kept for version in versions)  # there is room for all copies
        copies = [version.copy.size_bytes for version in versions if version.copy]
        assert self.house.service.keeper.bytes_held == sum(copies)

    def teardown(self) -> None:
        if not hasattr(self, "house"):
            return
        try:
            while self.held:
                pin, folder = self.held.pop()
                assert self.run(tokens_of(self.house.generate(pin))) == self.expected[folder]
            service = self.house.service
            if service.registry.fused:
                self.run(service.unfuse(service.registry.fused))
            for entry in service.registry.entries:
                self.run(service.unload(entry.id))
            assert self.run(self.house.snapshot()) == self.before
            assert self.run(self.house.residents()) == 0
        finally:
            self.run(self.stack.aclose())
            self.loop.close()
            self.folder.cleanup()


def digest_in(version: Version) -> str | None:
    """What the folder that a version was read from holds now."""
    if not isinstance(version.source, AdapterFolder):
        return None
    try:
        return AdapterContainer.from_directory(version.source.path).digest
    except InvalidAdapterError:
        return None


@pytest.mark.parametrize("memory_bytes", [2**30, 33_000])
def test_any_order(model_path: Path, root: Path, memory_bytes: int) -> None:
    AnyOrder.model_path = model_path
    AnyOrder.contents = root
    AnyOrder.memory_bytes = memory_bytes
    AnyOrder.refusals = set()
    AnyOrder.met = Counter()
    AnyOrder.expected = {"": greedy(read_model(model_path))}
    for name in IDS:
        digest = AdapterContainer.from_directory(root / name).digest
        AnyOrder.expected[digest] = answer_of(model_path, root / name)
    quick = settings(
        max_examples=8,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # with Phase.shrink, a failure takes minutes and is short
        suppress_health_check=[HealthCheck.too_slow],
    )
    run_state_machine_as_test(AnyOrder, settings=quick)
    assert all(AnyOrder.met[what] for what in ("rollback", "blend", "fused", "fused from a copy"))
    kinds = {"AdapterExistsError", "AdapterNotFoundError", "AdapterBusyError", "BaseIsFusedError"}
    if memory_bytes < 2**30:
        kinds = {"AdapterExistsError"}
        assert AnyOrder.refusals & {"AdapterMemoryError", "AdapterMemoryBusyError"}
    assert AnyOrder.refusals >= kinds
