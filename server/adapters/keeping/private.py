"""A folder on disk that belongs to one process. Runs on worker threads, one at a time."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

from adapters_core.files import new_part, sweep

__all__ = ["PrivateFolder"]

_PREFIX = "versions-"
_FOLDER = re.compile(rf"{_PREFIX}([0-9a-f]{{32}}|[a-z0-9_]{{8}})")  # of this version, and of older ones
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
        """Where it is; another one if somebody has removed it. Raises OSError if it cannot be made."""
        path = self._path
        if path is not None and not self._is_locked(path):
            self._unlock()
            # A cleaner may take the lock alone, which is older than the copies beside it.
            self._lock = _locked(path / _LOCK) if path.is_dir() else None
        if path is None or self._lock is None:
            path = self._make()
        self._path = path
        return path

    def close(self) -> None:
        """Remove it with all that is in it."""
        path, self._path = self._path, None
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)
        self._unlock()

    def sweep(self) -> list[Path]:
        """Remove what other processes left behind when they died; returns it. Raises OSError."""
        swept = [self._parent / name for name in sweep(self._parent)]
        for left in sorted(self._parent.iterdir()):
            if _FOLDER.fullmatch(left.name) and not left.is_symlink() and (left / _LOCK).is_file():
                with suppress(OSError):  # not ours to remove
                    lock = _locked(left / _LOCK)
                    if lock is not None:  # whoever lives holds it
                        shutil.rmtree(left, ignore_errors=True)
                        os.close(lock)
                        swept.append(left)
        return swept

    def _make(self) -> Path:
        self._parent.mkdir(parents=True, exist_ok=True)
        self.sweep()
        with new_part(self._parent, "versions") as made:
            made.chmod(0o700)
            self._lock = _locked(made / _LOCK)
            return made.rename(made.with_name(f"{_PREFIX}{uuid.uuid4().hex}"))

    def _is_locked(self, path: Path) -> bool:
        """Whether the lock that this holds is the one in the folder."""
        try:
            return self._lock is not None and os.path.samestat(os.fstat(self._lock), os.stat(path / _LOCK))
        except OSError:
            return False

    def _unlock(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def _locked(path: Path) -> int | None:
    """The lock at `path`, held until it is closed; None if another process holds it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
