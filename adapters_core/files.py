"""Files and folders that are whole or not there: written under another name, made durable, then renamed.

Until then their names begin with a dot and end in a mark, and who writes them holds a lock on them. What a
process that died left is known by both, and `sweep` removes it. Knows nothing of what is written. Any thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .open_folder import open_directory

__all__ = ["PART_MARK", "new_folder", "new_part", "replacing", "sweep"]

PART_MARK = ".mlx-graft-part"
"""Ends the name of what is being written, but for a file's suffix."""
_PART = re.compile(rf"\..*\.[0-9a-f]{{32}}{re.escape(PART_MARK)}(\.\w+)?", re.DOTALL)
_NAME_CHARS = 40  # of what it will be called; a name may have 255 bytes
_LOCKED = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_ATTEMPTS = 10


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, with its suffix; takes the place of `path` when the block ends well.

    If the block raises, what it wrote is removed and `path` is as it was.

    Raises:
        OSError: the file cannot be made or written.
    """
    with _descriptor_of(path.parent) as parent:
        name, descriptor = _new_part(parent, path.stem, path.suffix, is_folder=False)
        temporary = path.with_name(name)
        try:
            yield temporary
            os.fsync(descriptor)
            os.replace(name, path.name, src_dir_fd=parent, dst_dir_fd=parent)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=parent)
            os.close(descriptor)


@contextmanager
def new_folder(path: Path, *, follow: bool = True) -> Iterator[Path]:
    """An empty folder beside `path`, that gets its name when the block ends well; its parents are made.

    All that is in it is on the disk before it gets the name. If the block raises, nothing is left of it. What
    writers that died left beside it is swept. Unless `follow`, links on the way to it are refused, and what
    the block writes lies in the very folder that was made, whatever takes its place.

    Raises:
        FileExistsError: something of this name is there, before the block or after it.
        FolderChangedError: there is a link on its way.
        OSError: the folder cannot be made.
    """
    _refuse_existing(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        if not path.parent.is_symlink():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path.parent.name) from None
    opened = _descriptor_of(path.parent) if follow else open_directory(path.parent, path.parent)
    with opened as parent:
        _sweep(parent)
        with _new_folder(parent, path) as (name, descriptor):
            yield path.with_name(name) if follow else _path_of(descriptor, path.with_name(name))
            _sync_all(descriptor)
            if not _is(name, descriptor, parent):
                raise OSError(errno.ESTALE, "somebody moved the folder while it was written")
            _name(name, path.name, parent)
        with suppress(OSError):  # it is there already; this only makes the name as durable as the files
            os.fsync(parent)


@contextmanager
def new_part(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in `parent` for the block, to be renamed in it; removed at its end if it was not.

    Raises:
        OSError: it cannot be made.
    """
    with _descriptor_of(parent) as opened, _new_folder(opened, parent / name) as (made, _):
        yield parent / made


def sweep(folder: Path) -> list[str]:
    """Remove what writers that died left directly in `folder`; returns the names.

    What a living process writes stays, on whichever machine where the file system has locks for all; so does
    what cannot be locked, and all else.

    Raises:
        OSError: the folder cannot be listed.
    """
    with _descriptor_of(folder) as descriptor:
        return _sweep(descriptor)


def _sweep(parent: int) -> list[str]:
    swept = []
    for name in sorted(os.listdir(parent)):
        if _PART.fullmatch(name):
            with suppress(OSError):  # it goes just now, is being written, or is not ours to remove
                if _remove_unlocked(name, parent):
                    swept.append(name)
    return swept


def _remove_unlocked(name: str, parent: int) -> bool:
    """Remove a part that nobody writes. Raises OSError, such as BlockingIOError if somebody does."""
    is_folder = stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    descriptor = os.open(name, _LOCKED, dir_fd=parent)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is(name, descriptor, parent):
            return False
        if is_folder:
            shutil.rmtree(name, dir_fd=parent)
        else:
            os.unlink(name, dir_fd=parent)
    finally:
        os.close(descriptor)
    return True


@contextmanager
def _new_folder(parent: int, path: Path) -> Iterator[tuple[str, int]]:
    """The name of a new part for `path`, and a descriptor of it; removed at the end if it is there still."""
    name, descriptor = _new_part(parent, path.name, "", is_folder=True)
    try:
        yield name, descriptor
    finally:
        if _is(name, descriptor, parent):
            shutil.rmtree(name, ignore_errors=True, dir_fd=parent)
        os.close(descriptor)


def _new_part(parent: int, name: str, suffix: str, *, is_folder: bool) -> tuple[str, int]:
    """A new part's name and its descriptor, which holds the lock if the file system has locks."""
    for _ in range(_ATTEMPTS):
        part = f".{name[:_NAME_CHARS]}.{uuid.uuid4().hex}{PART_MARK}{suffix}"
        if is_folder:
            os.mkdir(part, dir_fd=parent)
        else:
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=parent))
        descriptor = os.open(part, _LOCKED, dir_fd=parent)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # it is being swept
            os.close(descriptor)
            continue
        except OSError:  # there are no locks here, so that nobody sweeps
            return part, descriptor
        if _is(part, descriptor, parent):
            return part, descriptor
        os.close(descriptor)
    raise OSError(errno.EBUSY, "what was to be written was removed again and again")


def _is(name: str, descriptor: int, parent: int) -> bool:
    """Whether `name` in an open folder is what is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(name, dir_fd=parent, follow_symlinks=False))
    except OSError:
        return False


def _path_of(descriptor: int, path: Path) -> Path:
    """A path that leads to an open folder whatever becomes of its names, where the system has one."""
    lasting = Path(f"/proc/self/fd/{descriptor}")
    try:
        is_here = os.path.samestat(os.stat(lasting), os.fstat(descriptor))
    except OSError:
        is_here = False
    return lasting if is_here else path


@contextmanager
def _descriptor_of(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _sync_all(folder: int) -> None:
    """Wait until all that is in an open folder is on the disk."""
    for _, _, files, inner in os.fwalk(".", topdown=False, dir_fd=folder):
        for name in files:
            descriptor = os.open(name, _LOCKED, dir_fd=inner)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        os.fsync(inner)


def _name(part: str, name: str, parent: int) -> None:
    """Give a folder its name. Raises FileExistsError if something has it."""
    _refuse_existing(Path(name), parent)
    try:
        os.rename(part, name, src_dir_fd=parent, dst_dir_fd=parent)
    except OSError:
        _refuse_existing(Path(name), parent)  # another was faster by a hair
        raise


def _refuse_existing(path: Path, parent: int | None = None) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        os.stat(path, dir_fd=parent, follow_symlinks=False)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path.name)
