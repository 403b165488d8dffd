"""What an adapter service may do: its limits, places and times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adapters_core.fusing.fusion import AUTO_THRESHOLD

__all__ = ["ServiceOptions"]


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """`memory_bytes` bounds what adapters in memory take; `models_dir` is where models are saved, and
    `fuse_threshold` the relative error of a layer's change up to which fusing takes a smaller form.

    `wait_seconds` bounds how long a request waits for others to make room for the adapters that it names,
    `max_waiting` how many wait for that, and how many for loads. Private copies of versions lie in a
    folder under `kept_dir` (None: the system's for temporary files), `kept_bytes` at most.
    `watched_dir`, the adapters root if it is watched, is read where it was the same for `settle_seconds`,
    and looked at every `rescan_seconds` whatever the system tells.
    """

    memory_bytes: int
    wait_seconds: float = 30.0
    max_waiting: int = 256
    load_on_demand: bool = True
    unload_timeout_seconds: float = 30.0
    models_dir: Path | None = None
    fuse_threshold: float = AUTO_THRESHOLD
    kept_dir: Path | None = None
    kept_bytes: int = 1 << 32
    watched_dir: Path | None = None
    settle_seconds: float = 1.0
    rescan_seconds: float = 5.0
