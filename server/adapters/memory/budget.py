"""How much memory adapters may take when nobody says: a share of the device's. Main thread, at the start."""

from __future__ import annotations

import os
from collections.abc import Mapping

import mlx.core as mx

__all__ = ["DEFAULT_SHARE", "default_memory_bytes"]

DEFAULT_SHARE = 8
"""One part in so many: the base, the rows' caches and kept prompts need the rest."""

_TOTAL = ("memory_size", "total_memory")  # Metal's name, CUDA's name


def default_memory_bytes(device: Mapping[str, str | int] | None = None) -> int:
    """An eighth of the memory that MLX tells of in `device` (None: its default one).

    MLX tells none of a CPU's; then it is an eighth of the machine's.
    """
    told = mx.device_info() if device is None else device
    total = next((value for name in _TOTAL if isinstance(value := told.get(name), int) and value > 0), None)
    if total is None:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, total // DEFAULT_SHARE)
