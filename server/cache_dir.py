"""Where the caches are that outlive a process. Imports no MLX and reads no settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["default_cache_dir"]


def default_cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """$GRAFT_CACHE_DIR, else mlx-graft under $XDG_CACHE_HOME, else ~/.cache/mlx-graft."""
    if chosen := environ.get("GRAFT_CACHE_DIR"):
        return Path(chosen).expanduser()
    caches = environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "mlx-graft"
