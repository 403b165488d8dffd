"""What is to be fused: adapters, each once, and weights, as the registry has them at one instant.

Changes nothing. Runs on the event loop; `read_again` on a worker thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.nn as nn

from adapters_core.container import AdapterContainer
from adapters_core.errors import BlendError
from adapters_core.fusing.fusion import Precision

from ..errors import AdapterBusyError, AdapterChangedError, AdaptersLoadedError, quoted
from ..originals import read_version
from ..pins import Terms
from ..registry import Registry
from ..rows import row_of
from ..versions import Entry, Version

__all__ = ["Choice", "choose"]


@dataclass(frozen=True, slots=True)
class Choice:
    """Entries, each once, and their weights; `versions` are what they mean at this instant."""

    entries: tuple[Entry, ...]
    weights: tuple[float, ...]
    versions: tuple[Version, ...]

    @property
    def name(self) -> str:
        """The adapter by which the fusion is known."""
        return self.entries[0].id

    @property
    def is_alone(self) -> bool:
        """One adapter as it is: then the base answers as a request that names it would be answered."""
        return self.weights == (1.0,)

    @property
    def terms(self) -> Terms:
        """(id, weight) of each."""
        return [(entry.id, weight) for entry, weight in zip(self.entries, self.weights, strict=True)]

    def require_same(self, now: Choice) -> None:
        """Raises AdapterChangedError if an entry means another version than in `now`, a later choice."""
        for entry, version, current in zip(self.entries, self.versions, now.versions, strict=True):
            if version is not current:
                raise AdapterChangedError(entry.id)

    def read_again(self, model: nn.Module) -> list[AdapterContainer]:
        """The adapters as they were loaded. Runs on a worker thread.

        Raises:
            AdapterChangedError, InvalidAdapterError: neither a private copy nor the folder holds one.
        """
        pairs = zip(self.entries, self.versions, strict=True)
        return [read_version(version, model, entry.id) for entry, version in pairs]

    def mark(self, precision: Precision, threshold: float) -> str:
        """What tells the fused base from any other: the same adapters at another precision are another."""
        pairs = zip(self.versions, self.weights, strict=True)
        terms = "+".join(f"{weight!r}*{version.resident.digest}" for version, weight in pairs)
        return f"{terms}@{precision}@{threshold!r}"


def choose(registry: Registry, terms: Terms, unload_others: bool) -> Choice:
    """What `terms` (id, weight) mean now, if they may be fused; the weights of an id are added up.

    Raises:
        AdapterNotFoundError, BaseIsFusedError, AdaptersLoadedError, AdapterBusyError: the state does not
            allow it.
        BlendError: a weight of 0, or a DoRA that is weighted or not alone.
    """
    weights: dict[str, float] = {}
    for adapter_id, weight in terms:
        weights[adapter_id] = weights.get(adapter_id, 0.0) + weight
    entries = tuple(registry.get(adapter_id) for adapter_id in weights)
    registry.refuse_if_fused("nothing else can be fused")
    draining = next((other for other in registry.entries if other.state == "draining"), None)
    if draining is not None:
        raise AdapterBusyError(
            f"Adapter {quoted(draining.id)} is being unloaded. Try again when it is gone.", draining.in_flight
        )
    versions = tuple(entry.current for entry in entries)
    row = row_of(list(zip(weights, versions, weights.values(), strict=True)))
    if len(row) < len(entries):
        raise BlendError("A weight of 0 fuses nothing; leave that adapter out.")
    others = [other.id for other in registry.entries if other not in entries]
    if others and not unload_others:
        raise AdaptersLoadedError(entries[0].id, others)
    return Choice(entries, tuple(weights.values()), versions)
