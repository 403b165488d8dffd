"""Which adapters there are: ids, versions, pins, the active one, the fused one, those that were unloaded.

Plain state, changed at one instant each time; nothing here waits. A name is resolved to a Pin, which keeps
the versions that it names until it is released, whatever becomes of the name meanwhile. An adapter that is
registered need not be in memory: that is the business of `residency`. Knows no weights, files or threads.
Used on the event loop only.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from adapters_core.bank import ResidentAdapter, RowAdapters, make_row

from .errors import (
    AdapterNotFoundError,
    AdaptersWithModelError,
    BaseIsFusedError,
    UnknownModelError,
    quoted,
)
from .folder import AdapterFolder, is_valid_id

__all__ = ["Entry", "Kind", "Pin", "Registry", "Resolved", "State", "Terms", "Version"]

Kind = Literal["base", "adapter", "blend"]
State = Literal["ready", "draining", "fused"]

Terms = Sequence[tuple[str, float]]
"""What a request adds to the base, by name: (id, weight)."""


@dataclass(eq=False, slots=True)
class Version:
    """One content of one id: what it is, where it came from, and how many requests use it.

    `resident` describes it and stays the same object when it leaves memory and comes back, so that a row may
    name it before it is there. `in_memory` says whether the bank has it, `loading` whether it is on its way.
    """

    number: int
    resident: ResidentAdapter
    folder: AdapterFolder
    created: float = field(default_factory=time.time)
    load_seconds: float = 0.0
    pins: int = 0
    pinned: bool = False
    in_memory: bool = False
    loading: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes that it takes in memory."""
        return self.resident.size_bytes


@dataclass(eq=False, slots=True)
class Entry:
    """An id: its current version, and older ones that requests in flight still use."""

    id: str
    current: Version
    retired: list[Version] = field(default_factory=list)
    state: State = "ready"
    requests: int = 0
    last_used: float | None = None

    @property
    def pinned(self) -> bool:
        """Whether what the id means stays in memory."""
        return self.current.pinned

    @property
    def versions(self) -> list[Version]:
        """All that may lie in the bank."""
        return [self.current, *self.retired]

    @property
    def in_flight(self) -> int:
        """Pins on any version."""
        return sum(version.pins for version in self.versions)

    @property
    def uses(self) -> int:
        """Pins, and loads under way."""
        return sum(version.pins + version.loading for version in self.versions)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a request names, at this instant: entries, each once, and the row that computes with them."""

    entries: tuple[Entry, ...]
    row: RowAdapters

    @property
    def versions(self) -> tuple[Version, ...]:
        """The versions that the row computes with or that were named at weight 0."""
        return tuple(entry.current for entry in self.entries)


class Pin:
    """What a request computes with, kept until `release`.

    `served_name` is the adapter's id where it is one alone, else the base's.
    """

    __slots__ = ("_release", "row", "served_name")

    def __init__(self, row: RowAdapters, served_name: str, release: Callable[[], None]) -> None:
        self.row = row
        self.served_name = served_name
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Let go; only the first call counts."""
        release, self._release = self._release, None
        if release is not None:
            release()


class Registry:
    """The adapters beside the base model named `base`.

    `on_release` is told, for every pin that drops, which versions it kept.
    """

    def __init__(
        self, base: str, on_release: Callable[[Sequence[Version]], None] = lambda versions: None
    ) -> None:
        self.base = base
        self.active: str | None = None
        self.fused: str | None = None
        self.unloaded: set[str] = set()
        self.in_flight = 0
        """Pins of every kind: requests that compute with the base, with or without adapters."""
        self.totals: Counter[Kind] = Counter()
        """Requests since the start, by what they were computed with."""
        self._entries: dict[str, Entry] = {}
        self._replaced: set[Entry] = set()
        """Entries that may have retired versions."""
        self._on_release = on_release

    @property
    def entries(self) -> list[Entry]:
        """All entries, in the order of loading."""
        return list(self._entries.values())

    @property
    def served(self) -> list[str]:
        """The names that requests may use now, the base first."""
        return [self.base, *(entry.id for entry in self.entries if self._is_served(entry))]

    def find(self, adapter_id: str) -> Entry | None:
        """The entry of exactly this id."""
        return self._entries.get(adapter_id)

    def get(self, adapter_id: str) -> Entry:
        """The entry of exactly this id. Raises AdapterNotFoundError."""
        entry = self._entries.get(adapter_id)
        if entry is None:
            raise AdapterNotFoundError(f"No adapter {quoted(adapter_id)} is loaded.")
        return entry

    def terms(self, model: str | None, adapters: Terms | None) -> Terms:
        """The adapters that a request names, as of now; they need not be loaded.

        Raises:
            UnknownModelError: `model` cannot be a name here.
            AdaptersWithModelError: `model` names an adapter, and there are `adapters` as well.
        """
        named = self._adapter_named(model)
        if adapters is None:
            return [] if named is None else [(named, 1.0)]
        if named is not None and not _means_default(model):
            raise AdaptersWithModelError(named, self.base)
        for adapter_id, _ in adapters:
            if not is_valid_id(adapter_id, self.base):
                raise UnknownModelError(adapter_id, self.served, param="adapters")
        return adapters

    def pin(self, model: str | None, adapters: Terms | None = None) -> Pin:
        """Resolve what a request names, and keep it. Raises as `resolve`."""
        return self.keep(self.resolve(model, adapters))

    def resolve(self, model: str | None, adapters: Terms | None = None) -> Resolved:
        """What a request names, as of now.

        Raises:
            UnknownModelError: it is not served.
            AdaptersWithModelError: as in `terms`.
            BaseIsFusedError: it names another adapter than the one that is fused into the base.
            BlendError: the weights cannot be computed.
        """
        terms = self.terms(model, adapters)
        entries = [self._served_entry(name, "model" if adapters is None else "adapters") for name, _ in terms]
        if self.fused is None:
            pairs = zip(entries, terms, strict=True)
            row = make_row((entry.current.resident, weight) for entry, (_, weight) in pairs)
        else:
            self._require_fused_only(self.fused, terms)
            row = ()
        return Resolved(tuple(dict.fromkeys(entries)), row)

    def keep(self, resolved: Resolved, is_counted: bool = False) -> Pin:
        """A pin on what was resolved at this very instant; `is_counted` if its request had one before."""
        now = time.time()
        entries, versions = resolved.entries, resolved.versions
        self.in_flight += 1
        if not is_counted:
            self.totals["base" if not entries else "adapter" if len(entries) == 1 else "blend"] += 1
        for entry in entries:
            entry.current.pins += 1
            entry.requests += not is_counted
            entry.last_used = now

        def release() -> None:
            self.in_flight -= 1
            for version in versions:
                version.pins -= 1
            self._on_release(versions)

        return Pin(resolved.row, entries[0].id if len(entries) == 1 else self.base, release)

    def publish(self, adapter_id: str, version: Version, pinned: bool | None = None) -> Entry:
        """Make `version` what `adapter_id` means; a version before it is retired. `pinned` None keeps it."""
        entry = self._entries.get(adapter_id)
        if entry is None:
            entry = self._entries[adapter_id] = Entry(adapter_id, version)
        else:
            version.pinned, entry.current.pinned = entry.current.pinned, False
            self.retire(entry, entry.current)
            entry.current = version
        if pinned is not None:
            version.pinned = pinned
        self.unloaded.discard(adapter_id)
        return entry

    def retire(self, entry: Entry, version: Version) -> None:
        """`version` is an older one of `entry`, which nothing will name."""
        entry.retired.append(version)
        self._replaced.add(entry)

    def start_draining(self, entry: Entry) -> bool:
        """Serve `entry` to no new request; returns whether it was the active one."""
        entry.state = "draining"
        was_active = self.active == entry.id
        if was_active:
            self.active = None
        return was_active

    def stop_draining(self, entry: Entry, was_active: bool) -> None:
        """Serve `entry` again, as the active one if it was and no other has become it."""
        entry.state = "ready"
        if was_active and self.active is None:
            self.active = entry.id

    def remove(self, entry: Entry) -> None:
        """Forget `entry`, because a call unloaded it."""
        if self._entries.get(entry.id) is entry:
            del self._entries[entry.id]
        self._replaced.discard(entry)
        if self.active == entry.id:
            self.active = None
        self.unloaded.add(entry.id)

    def take_stale(self) -> list[Version]:
        """The retired versions that nothing uses any more; they are forgotten here."""
        stale: list[Version] = []
        for entry in tuple(self._replaced):
            stale += [version for version in entry.retired if not _is_used(version)]
            entry.retired = [version for version in entry.retired if _is_used(version)]
            if not entry.retired:
                self._replaced.discard(entry)
        return stale

    @property
    def has_stale(self) -> bool:
        """Whether `take_stale` would find any."""
        return any(not _is_used(version) for entry in self._replaced for version in entry.retired)

    def digests(self) -> set[str]:
        """The contents that requests can still name or compute with, in memory or not."""
        return {version.resident.digest for entry in self._entries.values() for version in entry.versions}

    def activate(self, adapter_id: str | None) -> str | None:
        """Change what "default" means; returns what it meant before.

        Raises:
            AdapterNotFoundError: it is not loaded, or on its way out.
            BaseIsFusedError: another adapter is fused.
        """
        if adapter_id is not None:
            entry = self.get(adapter_id)
            if not self._is_served(entry):
                raise AdapterNotFoundError(f"Adapter {quoted(adapter_id)} is being unloaded.")
            if self.fused not in (None, adapter_id):
                raise BaseIsFusedError(self.fused, f"{quoted(adapter_id)} cannot be the active one")
        previous, self.active = self.active, adapter_id
        return previous

    def _adapter_named(self, model: str | None) -> str | None:
        if model == self.base:
            return None
        if model is None or _means_default(model):
            return self.active
        adapter_id = model.removeprefix(f"{self.base}:")
        if not is_valid_id(adapter_id, self.base):
            raise UnknownModelError(model, self.served)
        return adapter_id

    def _is_served(self, entry: Entry) -> bool:
        return entry.state != "draining"

    def _served_entry(self, adapter_id: str, param: str) -> Entry:
        entry = self._entries.get(adapter_id)
        if entry is None or not self._is_served(entry):
            if self.fused is not None and adapter_id in self.unloaded:
                raise BaseIsFusedError(self.fused, f"{quoted(adapter_id)} is not served")
            raise UnknownModelError(adapter_id, self.served, param)
        return entry

    def _require_fused_only(self, fused: str, terms: Terms) -> None:
        if terms and (len(terms) > 1 or terms[0] != (fused, 1.0)):
            raise BaseIsFusedError(fused, "no other adapter or weight can be computed with")


def _is_used(version: Version) -> bool:
    return bool(version.pins) or version.loading


def _means_default(model: str | None) -> bool:
    return model in (None, "", "default")
