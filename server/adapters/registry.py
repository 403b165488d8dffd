"""Which adapters there are: ids, versions, pins, the active one, the fused one, those that were unloaded.

Plain state, changed at one instant each time; nothing here waits. A name is resolved to a Pin, which keeps
the versions that it names until it is released, whatever becomes of the name meanwhile. An adapter that is
registered need not be in memory: that is the business of `memory`. Knows no weights, files or threads.
Used on the event loop only.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

from .errors import (
    AdapterNotFoundError,
    AdaptersWithModelError,
    BaseIsFusedError,
    UnknownModelError,
    UnknownVersionError,
    quoted,
    some_of,
)
from .names import checkpoint_of, parse_name
from .pins import Kind, Pin, Resolved, Terms
from .rows import row_of
from .versions import Entry, Version

__all__ = ["Registry"]


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
        self.fused_sum: Terms = ()
        """What is fused, if it is weighted or has company, so that no adapter's name stands for it."""
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
    def versions(self) -> set[Version]:
        """All versions of all entries."""
        return {version for entry in self._entries.values() for version in entry.versions}

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
            loaded = some_of(list(self._entries))
            raise AdapterNotFoundError(
                f"No adapter {quoted(adapter_id)} is loaded. "
                + ("A call unloaded it, and a call can load it. " if self.was_unloaded(adapter_id) else "")
                + f"Loaded are: {loaded}."
            )
        return entry

    def living(self, text: str) -> tuple[Entry, Version]:
        """The entry and the version that `text` names (`id`, `id@2`, `base:` may precede), served or not.

        Raises:
            AdapterNotFoundError: no such id is registered.
            UnknownVersionError: it has no such version, or has it no more.
        """
        name = parse_name(text.removeprefix(f"{self.base}:"), self.base)
        entry = self.get(text if name is None else name.entry)
        asked = None if name is None else name.version
        for version in entry.named:
            if asked in (None, version.number):
                return entry, version
        raise UnknownVersionError(entry.id, asked, [each.number for each in entry.named], "version")

    def was_unloaded(self, adapter_id: str) -> bool:
        """By a call, itself or the adapter that it is a checkpoint of."""
        checkpoint = checkpoint_of(adapter_id)
        trained = None if checkpoint is None else checkpoint.id
        return not self.unloaded.isdisjoint({adapter_id, trained})

    def refuse_if_fused(self, refused: str) -> None:
        """Raises BaseIsFusedError, which says what is `refused`, if anything is fused into the base."""
        if self.fused is not None:
            raise BaseIsFusedError(self.fused, refused, self.fused_sum)

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
        for name, _ in adapters:
            if parse_name(name, self.base) is None:
                raise UnknownModelError(name, self.served, param="adapters")
        return adapters

    def pin(self, model: str | None, adapters: Terms | None = None) -> Pin:
        """Resolve what a request names, and keep it. Raises as `resolve`."""
        return self.keep(self.resolve(model, adapters))

    def resolve(self, model: str | None, adapters: Terms | None = None) -> Resolved:
        """What a request names, as of now.

        Raises:
            UnknownModelError, UnknownVersionError: it is not served.
            AdaptersWithModelError: as in `terms`.
            BaseIsFusedError: it names another adapter than the one that is fused into the base.
            BlendError: the weights cannot be computed.
        """
        terms = self.terms(model, adapters)
        param = "model" if adapters is None else "adapters"
        found = [(self._served_version(name, param), weight) for name, weight in terms]
        if self.fused is None:
            row = row_of([(entry.id, version, weight) for (entry, version), weight in found])
        else:
            self._require_fused_only(self.fused, found)
            row = ()
        entries = {version: entry for (entry, version), _ in found}
        name = terms[0][0] if len(entries) == 1 else self.base
        return Resolved(tuple(entries.values()), tuple(entries), row, name)

    def keep(self, resolved: Resolved, is_counted: bool = False) -> Pin:
        """A pin on what was resolved at this very instant; `is_counted` if its request had one before."""
        now = time.time()
        versions = resolved.versions
        self.in_flight += 1
        if not is_counted:
            self.totals["base" if not versions else "adapter" if len(versions) == 1 else "blend"] += 1
        for version in versions:
            version.pins += 1
        for entry in dict.fromkeys(resolved.entries):
            entry.requests += not is_counted
            entry.last_used = now

        def release() -> None:
            self.in_flight -= 1
            for version in versions:
                version.pins -= 1
            self._on_release(versions)

        return Pin(resolved.row, resolved.served_name, release)

    def publish(self, adapter_id: str, version: Version, pinned: bool | None = None) -> Entry:
        """Make `version` what `adapter_id` means, as the next that it gets. `pinned` None keeps it.

        A version before it is what a rollback leads to from now on, if it is kept; if not, it is retired.
        """
        entry = self._entries.get(adapter_id)
        version.number = 1 if entry is None else entry.newest.number + 1
        if entry is None:
            entry = self._entries[adapter_id] = Entry(adapter_id, version, newest=version)
        else:
            self._make_current(entry, version)
            entry.newest = version
        if pinned is not None:
            version.pinned = pinned
        self.unloaded.discard(adapter_id)
        return entry

    def roll_back(self, entry: Entry) -> None:
        """Make the previous version of `entry`, which must have one, the current one again."""
        version, entry.previous = entry.previous, None
        if version is None:
            raise RuntimeError("expected a previous version, but there is none")
        self._make_current(entry, version)

    def forget_previous(self, version: Version) -> None:
        """`version` cannot come back any more: no rollback leads to it."""
        for entry in self._entries.values():
            if entry.previous is version:
                entry.previous = None
                self.retire(entry, version)

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

    def start_fused(self, entries: Sequence[Entry], terms: Terms = ()) -> None:
        """The base is fused with `entries`, known by the first; a sum of `terms` answers in no other name."""
        self.fused, self.fused_sum = entries[0].id, terms
        for entry in entries:
            entry.state = "fused"
            if terms and self.active == entry.id:
                self.active = None

    def end_fused(self, entries: Sequence[Entry]) -> None:
        """The base is bare again, and `entries` are served."""
        self.fused, self.fused_sum = None, ()
        for entry in entries:
            entry.state = "ready"

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
        return {version.resident.digest for version in self.versions}

    def activate(self, adapter_id: str | None) -> str | None:
        """Change what "default" means; returns what it meant before.

        Raises:
            AdapterNotFoundError: it is not loaded, or on its way out.
            BaseIsFusedError: another adapter is fused.
        """
        if adapter_id is not None:
            entry = self.get(adapter_id)
            if self.fused_sum or self.fused != adapter_id:
                self.refuse_if_fused(f"{quoted(adapter_id)} cannot be the active one")
            if not self._is_served(entry):
                raise AdapterNotFoundError(f"Adapter {quoted(adapter_id)} is being unloaded.")
        previous, self.active = self.active, adapter_id
        return previous

    def _adapter_named(self, model: str | None) -> str | None:
        if model == self.base:
            return None
        if model is None or _means_default(model):
            return self.active
        name = model.removeprefix(f"{self.base}:")
        if parse_name(name, self.base) is None:
            raise UnknownModelError(model, self.served)
        return name

    def _is_served(self, entry: Entry) -> bool:
        return entry.state == "ready" or (entry.state == "fused" and not self.fused_sum)

    def _make_current(self, entry: Entry, version: Version) -> None:
        older, entry.current = entry.current, version
        version.pinned, older.pinned = older.pinned, False
        if not older.kept:
            self.retire(entry, older)  # what a rollback leads to stays the one before
            return
        if entry.previous is not None:
            self.retire(entry, entry.previous)
        entry.previous = older

    def _served_version(self, text: str, param: str) -> tuple[Entry, Version]:
        name = parse_name(text, self.base)
        entry = None if name is None else self._entries.get(name.entry)
        if name is None or entry is None or not self._is_served(entry):
            if name is not None and (entry or name.entry in self.unloaded):
                self.refuse_if_fused(f"{quoted(text)} is not served")
            raise UnknownModelError(text, self.served, param)
        for version in entry.named:
            if name.version in (None, version.number):
                return entry, version
        raise UnknownVersionError(entry.id, name.version, [each.number for each in entry.named], param)

    def _require_fused_only(self, fused: str, found: Sequence[tuple[tuple[Entry, Version], float]]) -> None:
        allowed = all(
            version is entry.current and entry.id == fused and weight == 1.0
            for (entry, version), weight in found
        )
        if len(found) > 1 or not allowed:
            self.refuse_if_fused("no other adapter, version or weight can be computed with")


def _is_used(version: Version) -> bool:
    return bool(version.pins) or version.loading


def _means_default(model: str | None) -> bool:
    return model in (None, "", "default")
