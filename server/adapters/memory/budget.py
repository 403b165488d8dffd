"""How much memory adapters may take when nobody says: a share of the device's. Main thread, at the start."""

from __future__ import annotations

from collections.abc import Mapping

from server.engine.memory_limits import total_bytes

__all__ = ["DEFAULT_SHARE", "default_memory_bytes"]

DEFAULT_SHARE = 8
"""One part in so many: the base, the rows' caches and kept prompts need the rest."""


def default_memory_bytes(device: Mapping[str, str | int] | None = None) -> int:
    """An eighth of what the process may take of `device`, as MLX tells of it (None: the default one)."""
    return max(1, total_bytes(device) // DEFAULT_SHARE)
