"""How an adapter's files look from outside: sizes, times and inodes, never their contents.

Two equal looks some time apart say that nobody was writing in between. Reads the file system, so it runs on a
worker thread.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from .errors import LifeCycleError
from .folder import AdapterFolder, AdapterFolders

__all__ = ["Look", "Rest", "look_around", "look_at", "unchanged_seconds"]

_MAX_SEEN = 10_000

Look = tuple[tuple[str, int, int, int, int], ...]
"""For each file of an adapter that is there: name, size in bytes, times of its content's and of its inode's
last change in nanoseconds, inode."""


def look_at(folder: AdapterFolder) -> Look:
    """How the files that make up the adapter in `folder` look now; empty if there are none."""
    seen: list[tuple[str, int, int, int, int]] = []
    for name in folder.file_names:
        with suppress(OSError):
            status = os.stat(folder.path / name)
            times_ns = status.st_mtime_ns, status.st_ctime_ns
            seen.append((name, status.st_size, *times_ns, status.st_ino))
    return tuple(seen)


class Rest:
    """For how long folders have looked as they do, by the clock that nobody sets, and by their files' times.

    What an earlier process saw is known from the files alone; that the system's clock was set back, from what
    was seen alone. Used on one thread.
    """

    def __init__(self) -> None:
        self._since: dict[Path, tuple[Look, float]] = {}

    def seconds(self, folder: AdapterFolder, look: Look) -> float:
        """For how long nobody has written the files of `folder`, which look so now, as far as is known."""
        now = time.monotonic()
        seen, since = self._since.pop(folder.path, ((), now))
        if seen != look:
            since = now
        self._since[folder.path] = look, since
        while len(self._since) > _MAX_SEEN:
            del self._since[next(iter(self._since))]
        return max(now - since, _by_times(look))

    def note_whole(self, folder: AdapterFolder, look: Look) -> None:
        """`folder` got its name when all was in it, so nobody is writing what looks so."""
        self._since[folder.path] = look, -math.inf


def unchanged_seconds(folder: AdapterFolder) -> float:
    """For how long nobody has written the adapter's files, by their own times."""
    return _by_times(look_at(folder))


def _by_times(look: Look) -> float:
    """Seconds since the last change that the times in `look` tell of.

    Whoever copies a file may give its content any time, an old one or one to come, but not its inode: that
    of a file written just now has just changed, and a content from the future says nothing.
    """
    now_ns, changed_ns = time.time_ns(), 0
    for _, _, content_ns, inode_ns, _ in look:
        if content_ns <= now_ns:
            changed_ns = max(changed_ns, content_ns)
        changed_ns = max(changed_ns, min(inode_ns, now_ns))
    return (now_ns - changed_ns) / 1e9


def look_around(
    folders: AdapterFolders, base: str, loaded: Mapping[str, AdapterFolder]
) -> dict[str, tuple[AdapterFolder, Look]]:
    """What lies directly under the adapters root, by id, and what was `loaded`, from where it was."""
    found: dict[str, AdapterFolder] = {}
    for adapter_id in folders.available(base, loaded):
        if (folder := folders.on_demand(adapter_id)) is not None:
            found[adapter_id] = folder
    for adapter_id, folder in loaded.items():
        with suppress(LifeCycleError):  # it has gone, or leads out of the root by now
            found[adapter_id] = folders.again(folder)
    looks = {adapter_id: (folder, look_at(folder)) for adapter_id, folder in found.items()}
    # A config alone is a folder that is being written, or no adapter yet.
    return {adapter_id: (folder, look) for adapter_id, (folder, look) in looks.items() if len(look) > 1}
