"""The budget alone: whatever is taken, loaded, released and replaced, memory holds what it may and must."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters_core.mixed.residents import ResidentAdapter
from server.adapters.errors import AdapterMemoryError
from server.adapters.folder import AdapterFolder
from server.adapters.memory.budget import DEFAULT_SHARE, default_memory_bytes
from server.adapters.memory.residency import Reservation, Residency
from server.adapters.versions import Version

LIMIT_BYTES = 10


def version(size_bytes: int, *, pinned: bool = False) -> Version:
    resident = ResidentAdapter("sha256:x", "lora", 4, 1.0, ("q",), size_bytes)
    return Version(1, resident, AdapterFolder(Path("x"), "x"), pinned=pinned)


def total(versions: Collection[Version]) -> int:
    return sum(each.size_bytes for each in versions)


def put(residency: Residency, *versions: Version) -> None:
    for each in versions:
        residency.put(each)


class Memory(RuleBasedStateMachine):
    """A plain model of the bank beside it: what is in it changes only as `make_room` and `settle` say."""

    @initialize(sizes=st.lists(st.integers(1, 6), min_size=3, max_size=8))
    def begin(self, sizes: list[int]) -> None:
        self.residency = Residency(LIMIT_BYTES)
        self.versions = [version(size) for size in sizes]
        self.bank: set[Version] = set()
        self.requests: list[list[Version]] = []
        self.loads: list[tuple[Version, Reservation]] = []

    @rule(data=st.data(), is_next=st.booleans())
    def take(self, data: st.DataObject, is_next: bool) -> None:
        wanted = data.draw(st.lists(st.sampled_from(self.versions), min_size=1, max_size=3, unique_by=id))
        before = self.residency.committed_bytes
        fresh = [
            each for each in wanted if not (each.loading or (each.in_memory and (each.pins or each.pinned)))
        ]
        beside = [each for each in self.bank if each.pinned and each not in wanted]
        if any(not each.in_memory for each in fresh) and total([*wanted, *beside]) > LIMIT_BYTES:
            with pytest.raises(AdapterMemoryError):
                self.residency.take(wanted, is_next)
            assert self.residency.committed_bytes == before
            return
        reservations = self.residency.take(wanted, is_next)
        if reservations is None:
            assert not is_next or before + total(fresh) > LIMIT_BYTES
            assert self.residency.committed_bytes == before
            return
        for each, reservation in zip(wanted, reservations, strict=True):
            each.pins += 1
            assert (reservation is None) == (each.in_memory or each not in fresh)
            if reservation is not None:
                self.loads.append((each, reservation))
        self.requests.append(wanted)

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), succeeds=st.booleans())
    def load(self, data: st.DataObject, succeeds: bool) -> None:
        each, reservation = self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))
        if succeeds:
            idle = [other for other in self.residency.versions if not (other.pins or other.pinned)]
            leaving = self.residency.make_room(reservation)
            assert leaving == idle[: len(leaving)]  # the least recently used first
            assert not any(other.pins or other.pinned or other.in_memory for other in leaving)
            self.bank -= set(leaving)
            self.bank.add(each)
            self.residency.settle(reservation, each)
        self.residency.cancel(reservation)
        each.loading = False

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        for each in self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1))):
            each.pins -= 1
            self.residency.touch(each)

    @rule(data=st.data())
    def pin_or_unpin(self, data: st.DataObject) -> None:
        here = [each for each in self.residency.versions if each.pins]
        if here:
            each = data.draw(st.sampled_from(here))
            each.pinned = not each.pinned

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "residency"):
            return
        assert {each for each in self.versions if each.in_memory} == self.bank
        assert set(self.residency.versions) == self.bank
        assert self.residency.bytes_held == total(self.bank) <= LIMIT_BYTES
        assert self.residency.committed_bytes <= LIMIT_BYTES
        loading = {each for each, _ in self.loads}
        for each in self.bank | loading:
            assert each.in_memory or each.loading


TestMemory = Memory.TestCase
TestMemory.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_what_can_never_fit_is_refused_at_once_and_the_rest_waits() -> None:
    residency = Residency(LIMIT_BYTES)
    pinned, used = version(4, pinned=True), version(5)
    put(residency, pinned, used)
    assert residency.take([used], True) == [None]
    used.pins = 1
    with pytest.raises(AdapterMemoryError) as raised:
        residency.take([version(7)], True)
    assert raised.value.details == {"needed_bytes": 11, "limit_bytes": 10}
    with pytest.raises(AdapterMemoryError):
        residency.reserve(7, None, is_next=False)
    assert residency.take([version(6)], True) is None
    assert residency.reserve(6, None, is_next=True) is None
    assert residency.take([version(1)], True) is not None


def test_a_request_gets_all_that_it_names_or_nothing() -> None:
    residency = Residency(LIMIT_BYTES)
    first, second, third = version(4), version(4), version(4)
    residency.take([first], True)
    first.pins = 1
    assert residency.take([second, third], True) is None
    assert residency.committed_bytes == 4
    assert not second.loading


def test_who_waits_is_not_passed_by_those_who_want_what_it_waits_for() -> None:
    residency = Residency(LIMIT_BYTES)
    older, newer = version(5), version(5)
    put(residency, older, newer)
    for each in (older, newer):
        residency.take([each], True)
        each.pins = 1
    assert residency.take([version(5)], True) is None  # it waits for the least recently used
    assert residency.take([older], False) is None
    assert residency.take([newer], False) == [None]
    assert residency.take([], False) == []
    older.pins = 0
    assert residency.take([older], False) is None


def test_what_is_claimed_stays_so_although_it_is_used_until_its_release() -> None:
    residency = Residency(LIMIT_BYTES)
    older, newer, wanted = version(5), version(5), version(5)
    put(residency, older, newer)
    for each in (older, newer) * 2:
        assert residency.take([each], True) == [None]
        each.pins += 1
    for _ in range(2):
        assert residency.take([wanted], True) is None
        assert residency.take([older], False) is None
        assert residency.take([newer], False) == [None]
        older.pins -= 1
        residency.touch(older)
    reservations = residency.take([wanted], True)
    assert reservations is not None
    assert reservations[0] is not None
    assert residency.make_room(reservations[0]) == [older]


def test_when_room_cannot_be_made_nothing_leaves() -> None:
    residency = Residency(LIMIT_BYTES)
    idle, used = version(3), version(5)
    put(residency, idle, used)
    reservation = residency.reserve(5, None, is_next=True)
    assert reservation is not None
    used.pins = 1
    reservation.size_bytes = 6
    with pytest.raises(AdapterMemoryError):
        residency.make_room(reservation)
    assert (residency.versions, idle.in_memory, residency.bytes_held) == ([idle, used], True, 8)


def test_a_version_in_use_is_not_taken_again_before_its_successor_has_come() -> None:
    residency = Residency(LIMIT_BYTES)
    old = version(8, pinned=True)
    put(residency, old)
    residency.take([old], True)
    old.pins = 1
    assert residency.reserve(8, old, is_next=True) is None
    assert residency.take([old], False) is None
    old.pins = 0
    successor = residency.reserve(8, old, is_next=True)
    assert successor is not None
    assert residency.make_room(successor) == [old]


def test_a_pinned_version_makes_way_for_its_successor_alone() -> None:
    residency = Residency(LIMIT_BYTES)
    old = version(6, pinned=True)
    put(residency, old)
    with pytest.raises(AdapterMemoryError):
        residency.reserve(5, None, is_next=True)
    successor = residency.reserve(5, old, is_next=True)
    assert successor is not None
    assert residency.committed_bytes == 6
    other = residency.reserve(4, None, is_next=True)
    assert other is not None
    assert residency.make_room(other) == []
    residency.settle(other, version(4))
    assert residency.make_room(successor) == [old]
    residency.settle(successor, version(5))
    assert residency.bytes_held == 9


def test_the_default_is_a_share_of_the_device() -> None:
    assert default_memory_bytes({"memory_size": 16 * 2**30}) == 16 * 2**30 // DEFAULT_SHARE
    assert default_memory_bytes({"total_memory": 80 * 2**30}) == 80 * 2**30 // DEFAULT_SHARE
    assert default_memory_bytes({"device_name": "cpu"}) > 2**20
    assert default_memory_bytes() > 2**20
