"""Files and folders that are whole or not there: written under another name, made durable, then renamed.

Knows nothing of what is written. Runs on any thread.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["new_folder", "replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new name beside `path`, with its suffix; takes the place of `path` when the block ends well.

    If the block raises, what it wrote is removed and `path` is as it was.
    """
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, that gets its name when the block ends well; its parents are made.

    Its name begins with a dot until then, and all that is in it is on the disk before it gets the other. If
    the block raises, nothing is left of it.

    Raises:
        FileExistsError: something of this name is there, before the block or after it.
        OSError: the folder cannot be made.
    """
    _refuse_existing(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path.parent.name) from None
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, files in os.walk(temporary, topdown=False):
            for name in (*files, ""):
                _sync(Path(folder, name))
        _refuse_existing(path)
        try:
            os.rename(temporary, path)
        except OSError:
            _refuse_existing(path)  # another was faster by a hair
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    with suppress(OSError):  # it is there already; this only makes the name as durable as the files
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path.name)
