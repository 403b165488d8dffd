"""A folder on disk that belongs to one process. Runs on worker threads, one at a time."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

__all__ = ["PrivateFolder"]

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


def _locked(path: Path) -> int | None:
    """The lock at `path`, held until it is closed; None if another process holds it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock
