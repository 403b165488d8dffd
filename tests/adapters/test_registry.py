"""The registry against a plain model of it: names, versions, pins, and what each may do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from adapters_core.mixed.residents import ResidentAdapter
from server.adapters.errors import (
    AdapterNotFoundError,
    AdaptersWithModelError,
    BaseIsFusedError,
    UnknownModelError,
)
from server.adapters.folder import AdapterFolder
from server.adapters.pins import Pin
from server.adapters.registry import Registry
from server.adapters.versions import Version

BASE = "foo"
IDS = ["foobar", "fo", "foo2", "Foo"]


def version(number: int, kind: str = "lora") -> Version:
    resident = ResidentAdapter(f"sha256:{number}", kind, 4, 1.0, ("q",), 10)
    return Version(number, resident, AdapterFolder(Path("x"), "x"))


class Life(RuleBasedStateMachine):
    """Every pin keeps its version; every name means one thing; every release counts once."""

    pins = Bundle("pins")

    @initialize()
    def begin(self) -> None:
        self.released = 0
        self.registry = Registry(BASE, self._on_release)
        self.current: dict[str, Version] = {}
        self.draining: set[str] = set()
        self.held: dict[Pin, list[Version]] = {}
        self.active: str | None = None
        self.numbers = 0

    def _on_release(self, versions: Sequence[Version]) -> None:
        self.released += 1

    @rule(name=st.sampled_from(IDS))
    def publish(self, name: str) -> None:
        if name in self.draining:
            return
        self.numbers += 1
        self.current[name] = version(self.numbers)
        self.registry.publish(name, self.current[name])

    @rule(target=pins, name=st.sampled_from([*IDS, BASE, "", "default", None]), qualified=st.booleans())
    def pin(self, name: str | None, qualified: bool) -> Pin | None:
        adapter = self.active if name in ("", "default", None) else None if name == BASE else name
        asked = f"{BASE}:{name}" if qualified and name in IDS else name
        if adapter is not None and (adapter not in self.current or adapter in self.draining):
            with pytest.raises(UnknownModelError):
                self.registry.pin(asked)
            return None
        pin = self.registry.pin(asked)
        versions = [] if adapter is None else [self.current[adapter]]
        assert [term[0] for term in pin.row] == [each.resident for each in versions]
        assert pin.served_name == (adapter or BASE)
        self.held[pin] = versions
        return pin

    @rule(pin=consumes(pins), times=st.integers(1, 3))
    def release(self, pin: Pin | None, times: int) -> None:
        if pin is None:
            return
        before = self.released
        for _ in range(times):
            pin.release()
        assert self.released == before + 1
        del self.held[pin]

    @rule(name=st.sampled_from(IDS), gives_up=st.booleans())
    def drain(self, name: str, gives_up: bool) -> None:
        if name not in self.current or name in self.draining:
            return
        entry = self.registry.get(name)
        was_active = self.registry.start_draining(entry)
        assert was_active == (self.active == name)
        if gives_up:
            self.registry.stop_draining(entry, was_active)
        else:
            self.draining.add(name)
            self.active = None if was_active else self.active

    @rule(name=st.sampled_from(IDS))
    def remove(self, name: str) -> None:
        if name in self.draining and not self.registry.get(name).in_flight:
            self.registry.remove(self.registry.get(name))
            self.draining.remove(name)
            del self.current[name]
            assert name in self.registry.unloaded

    @rule(name=st.sampled_from([*IDS, None]))
    def activate(self, name: str | None) -> None:
        if name is not None and (name not in self.current or name in self.draining):
            with pytest.raises(AdapterNotFoundError):
                self.registry.activate(name)
            return
        assert self.registry.activate(name) == self.active
        self.active = name

    @rule()
    def reap(self) -> None:
        stale = self.registry.take_stale()
        kept = {each for versions in self.held.values() for each in versions}
        assert not kept & set(stale)
        assert not set(self.current.values()) & set(stale)

    @invariant()
    def agrees(self) -> None:
        assert self.registry.in_flight == len(self.held)
        assert self.registry.active == self.active
        assert {entry.id: entry.current for entry in self.registry.entries} == self.current
        assert set(self.registry.served) == {BASE, *(self.current.keys() - self.draining)}
        held = [each for versions in self.held.values() for each in versions]
        for entry in self.registry.entries:
            assert [each.pins for each in entry.versions] == [held.count(each) for each in entry.versions]
        known = {each for entry in self.registry.entries for each in entry.versions}
        assert set(held) <= known
        assert not self.registry.unloaded & self.current.keys()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_two_adapters_and_their_weights() -> None:
    registry = Registry(BASE)
    for number, name in enumerate(["a", "b"]):
        registry.publish(name, version(number))
    pin = registry.pin(None, [("a", 0.5), ("b", 2.0)])
    assert pin.served_name == BASE
    assert sorted(weight for _, weight in pin.row) == [0.5, 2.0]
    assert [entry.in_flight for entry in registry.entries] == [1, 1]
    for model in ("a", f"{BASE}:a"):
        with pytest.raises(AdaptersWithModelError):
            registry.pin(model, [("b", 1.0)])
    registry.activate("a")
    assert registry.pin("default", [("b", 1.0)]).served_name == "b"
    assert registry.pin(BASE, []).row == ()


def test_while_one_is_fused_the_base_is_it_and_no_other_is_served() -> None:
    registry = Registry(BASE)
    for number, name in enumerate(["a", "b"]):
        registry.publish(name, version(number))
    registry.remove(registry.get("b"))
    registry.fused = "a"
    for name in (BASE, "a", f"{BASE}:a", None):
        assert registry.pin(name).row == ()
    assert registry.pin(None, [("a", 1.0)]).row == ()
    with pytest.raises(BaseIsFusedError):
        registry.pin(None, [("a", 0.5)])
    with pytest.raises(BaseIsFusedError):
        registry.pin("b")
    with pytest.raises(UnknownModelError):
        registry.pin("c")
