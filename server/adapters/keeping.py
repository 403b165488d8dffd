"""Private copies of versions that could not be read again: replaced ones, and those made in memory.

A folder that holds something new holds the old no more, so a version is copied aside the moment it is about
to be replaced: the very rows that lie in the bank, which come back bit for bit. The copies lie on disk, for
memory is what adapters compete for, and take so many bytes at most; the oldest that only a rollback would
need go first. Runs on the event loop; reads and writes on a thread of its own.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import mlx.core as mx
import structlog

from adapters_core.bank import PreparedAdapter
from adapters_core.formats.weights import digest_of

from .aside import run_aside
from .errors import VersionGoneError
from .memory.memory import Memory
from .registry import Registry
from .versions import Entry, Version

__all__ = ["Keeper", "PrivateFolder"]

_log = structlog.get_logger(__name__)
_PREFIX = "versions-"
_LOCK = "lock"


class PrivateFolder:
    """A folder of this process under `parent` (None: the system's for temporary files), made when needed.

    It goes with `close`. What other processes left behind when they died goes when one is made.
    """

    def __init__(self, parent: Path | None) -> None:
        self._parent = Path(tempfile.gettempdir()) / "mlx-graft" if parent is None else parent
        self._path: Path | None = None
        self._lock: int | None = None

    def path(self) -> Path:
        """Where it is. Raises OSError if it cannot be made."""
        if self._path is None:
            self._parent.mkdir(parents=True, exist_ok=True)
            self._sweep()
            made = Path(tempfile.mkdtemp(prefix=".", dir=self._parent))
            self._lock = _locked(made / _LOCK)
            self._path = made.rename(made.with_name(f"{_PREFIX}{made.name[1:]}"))
        return self._path

    def close(self) -> None:
        """Remove it with all that is in it."""
        path, self._path = self._path, None
        lock, self._lock = self._lock, None
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)

    def _sweep(self) -> None:
        for left in self._parent.glob(f"{_PREFIX}*"):
            if (lock := _locked(left / _LOCK)) is not None:  # whoever lives holds it
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)


@dataclass(frozen=True, slots=True)
class _Copy:
    """A file with the rows of a version, and the rest of what the bank needs, without rows.

    `digest` is that of the rows, so that what comes back is what went.
    """

    path: Path
    rest: PreparedAdapter
    digest: str
    size_bytes: int


class Keeper:
    """The copies of one registry's versions, in `folder`, `limit_bytes` at most."""

    def __init__(self, memory: Memory, registry: Registry, folder: PrivateFolder, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._memory = memory
        self._registry = registry
        self._folder = folder
        self._copies: dict[Version, _Copy] = {}  # oldest first
        self._numbers = count()
        self._writing = asyncio.Lock()

    @property
    def bytes_held(self) -> int:
        """Bytes of all copies."""
        return sum(copy.size_bytes for copy in self._copies.values())

    async def keep(
        self, version: Version, prepared: PreparedAdapter | None = None, beside: Version | None = None
    ) -> bool:
        """See to it that there is a copy of `version`; False if that cannot be.

        The copy is of `prepared`, or of what the bank has if that is None. That of `beside` is not given up
        for it.
        """
        async with self._writing:
            if version.kept:
                return True
            if prepared is None:
                prepared = await self._memory.copy_of(version)
            if prepared is None or not self._make_room(version.size_bytes, beside):
                return False
            try:
                copy = await run_aside(_write, self._folder, f"{next(self._numbers)}.safetensors", prepared)
            except (OSError, RuntimeError) as error:  # MLX's own errors of writing are RuntimeErrors
                _log.warning("version_not_kept", digest=version.resident.digest, reason=str(error))
                return False
            self._copies[version] = copy
            version.kept = True
            return True

    async def read(self, version: Version) -> PreparedAdapter:
        """The copy of `version`, under the identity that rows know it by.

        Raises:
            VersionGoneError: it cannot be read, or is not what was written; there is no copy any more.
        """
        prepared = None
        if (copy := self._copies.get(version)) is not None:
            with suppress(OSError, RuntimeError):
                prepared = await run_aside(_read, copy)
        if prepared is None:
            self.drop(version)
            raise VersionGoneError(version.resident.digest)
        return replace(prepared, resident=version.resident)

    @contextmanager
    def unless_replaced(self, entry: Entry | None) -> Iterator[None]:
        """Whoever fails to replace the current version of `entry` leaves no copy of it behind."""
        replaced = None if entry is None or entry.current.kept else entry.current
        try:
            yield
        except BaseException:
            # If another has replaced it meanwhile, the copy is what a rollback needs.
            if replaced is not None and entry is not None and entry.previous is not replaced:
                self.drop(replaced)
            raise

    def drop(self, version: Version) -> None:
        """Have no copy of `version` any more; no rollback leads to it then."""
        copy = self._copies.pop(version, None)
        version.kept = False
        self._registry.forget_previous(version)
        if copy is not None:
            with suppress(OSError):
                copy.path.unlink()

    def _make_room(self, size_bytes: int, beside: Version | None) -> bool:
        """Drop old copies that nothing but a rollback needs, until so many bytes more are allowed."""
        if size_bytes > self.limit_bytes:
            return False
        spare = {entry.previous for entry in self._registry.entries} - {beside}
        for version in list(self._copies):
            if self.bytes_held + size_bytes <= self.limit_bytes:
                break
            if version in spare and not version.loading:
                self.drop(version)
        return self.bytes_held + size_bytes <= self.limit_bytes


def _write(folder: PrivateFolder, name: str, prepared: PreparedAdapter) -> _Copy:
    path = folder.path() / name
    mx.save_safetensors(str(path), prepared.rows)
    return _Copy(path, replace(prepared, rows={}), digest_of(prepared.rows), path.stat().st_size)


def _read(copy: _Copy) -> PreparedAdapter | None:
    rows = mx.load(str(copy.path))
    if not isinstance(rows, dict):
        return None
    mx.eval(rows)
    return replace(copy.rest, rows=rows) if digest_of(rows) == copy.digest else None


def _locked(path: Path) -> int | None:
    """The lock at `path`, held until it is closed; None if another process holds it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
