"""What processes that were killed left of what they were writing: found and removed. Any thread.

Knows in which folders the server, `convert` and the demo write; `adapters_core.files` knows what is theirs.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from adapters_core.files import sweep
from server.adapters.keeping.private import PrivateFolder

__all__ = ["sweep_cache", "sweep_folders"]


def sweep_cache(cache_dir: Path) -> list[Path]:
    """Remove what is left of copies of versions, the demo's models and measurements. As `sweep_folders`."""
    swept = sweep_folders([cache_dir / "demo", cache_dir / "calibration"])
    with suppress(OSError):
        swept += PrivateFolder(cache_dir / "versions").sweep()
    return swept


def sweep_folders(folders: Iterable[Path]) -> list[Path]:
    """Remove what is left in `folders` and in the folders in them; returns it.

    What a living process writes stays, and all that is not the project's. What cannot be listed is passed
    over.
    """
    swept: list[Path] = []
    for folder in folders:
        with suppress(OSError):
            swept += [folder / name for name in sweep(folder)]
            for inner in folder.iterdir():
                if inner.is_dir() and not inner.is_symlink():
                    with suppress(OSError):
                        swept += [inner / name for name in sweep(inner)]
    return swept
