"""What is registered: ids, and the versions of each. Plain state. Knows no weights, files or threads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from adapters_core.mixed.residents import ResidentAdapter

from .copies import Copy
from .source import Source

__all__ = ["Entry", "State", "Version"]

State = Literal["ready", "draining", "fused"]


@dataclass(eq=False, slots=True)
class Version:
    """One content of one id: what it is, where it came from, and how many requests use it.

    `resident` describes it and stays the same object when it leaves memory and comes back, so that a row may
    name it before it is there. `in_memory` says whether the bank has it, `loading` whether it is on its way.
    From `copy`, which is private, it can be brought back whatever becomes of its source. `number` is 0 until
    it is published.
    """

    number: int
    resident: ResidentAdapter
    source: Source
    created: float = field(default_factory=time.time)
    load_seconds: float = 0.0
    pins: int = 0
    pinned: bool = False
    in_memory: bool = False
    loading: bool = False
    copy: Copy | None = None

    @property
    def kept(self) -> bool:
        """Whether there is a private copy."""
        return self.copy is not None

    @property
    def size_bytes(self) -> int:
        """Bytes that it takes in memory."""
        return self.resident.size_bytes


@dataclass(eq=False, slots=True)
class Entry:
    """An id: its current version, the one that a rollback leads to, and others still in use.

    `previous` is kept, so that it can come back whatever its folder holds by now; `retired` are versions that
    requests in flight began with and no name means any more. `newest` is the last that was loaded, which
    need not live: numbers go up from there. `checkpoints` are the steps that were seen in its folder.
    """

    id: str
    current: Version
    newest: Version
    previous: Version | None = None
    checkpoints: Sequence[int] = ()
    retired: list[Version] = field(default_factory=list)
    state: State = "ready"
    requests: int = 0
    last_used: float | None = None

    @property
    def pinned(self) -> bool:
        """Whether what the id means stays in memory."""
        return self.current.pinned

    @property
    def named(self) -> list[Version]:
        """Those that a request may name, the current one first."""
        return [self.current] if self.previous is None else [self.current, self.previous]

    @property
    def versions(self) -> list[Version]:
        """All that may lie in the bank."""
        return [*self.named, *self.retired]

    @property
    def in_flight(self) -> int:
        """Pins on any version."""
        return sum(version.pins for version in self.versions)

    @property
    def uses(self) -> int:
        """Pins, and loads under way."""
        return sum(version.pins + version.loading for version in self.versions)
