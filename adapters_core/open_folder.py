"""Folders that are opened once: what is listed and read is what was opened, whatever becomes of their names.

With a root, nothing outside of it is ever opened: links are resolved first, and what they lead to is opened
from the root downwards, one component at a time, none of which may be a link. Knows nothing of what the
files hold. Runs on any thread; an open folder is used by one at a time.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import FolderChangedError, InvalidAdapterError, OutsideRootError

__all__ = ["OpenFolder", "open_directory", "open_folder", "opened", "resolved_in"]

_ON_THE_WAY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""For folders that are only passed through. Linux needs no permission to list them."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""Nobody waits for the other end of a pipe; what is no regular file is closed at once."""
_PART_BYTES = 1 << 20


class OpenFolder:
    """A folder that is open: `name` is how errors call it, `path` where it was found, links resolved.

    `root` is what its files have to lie in; None: they may lie anywhere.
    """

    def __init__(self, descriptor: int, path: Path, root: Path | None) -> None:
        """Use `open_folder`, which closes the descriptor."""
        self.name = path.name
        self.path = path
        self.root = root
        self._descriptor = descriptor
        self._before = os.fstat(descriptor)
        self._files: dict[str, BinaryIO] = {}
        self._looks: dict[str, os.stat_result] = {}

    @property
    def has_changed(self) -> bool:
        """Whether anything was put into it, or taken away, since it was opened."""
        return os.fstat(self._descriptor).st_mtime_ns != self._before.st_mtime_ns

    def names(self) -> list[str]:
        """What is in it now, by name. Raises OSError."""
        return sorted(os.listdir(self._descriptor))

    def file(self, name: str) -> BinaryIO:
        """The regular file called `name` in it, at its beginning: the same each time, closed with the folder.

        Raises:
            FileNotFoundError: there is none, or it is no regular file.
            OutsideRootError, FolderChangedError: as `open_folder`.
            OSError: it cannot be opened.
        """
        if name not in self._files:
            self._looks[name], self._files[name] = self._open(name)
        file = self._files[name]
        file.seek(0)
        return file

    def read(self, name: str, most_bytes: int | None = None) -> bytes:
        """All that is in the file called `name`, or the first `most_bytes`.

        Raises:
            FolderChangedError: as `open_folder`; or somebody wrote the file meanwhile.
            FileNotFoundError, OutsideRootError, OSError: as `file`; or it cannot be read.
        """
        with self._at_rest(name) as (file, size_bytes):
            if most_bytes is not None:
                size_bytes = min(size_bytes, most_bytes)
            content = file.read(size_bytes)
            if len(content) < size_bytes:
                raise FolderChangedError(self.name)
        return content

    def copy(self, name: str, into: BinaryIO) -> int:
        """Write all that is in the file called `name` to `into`; returns its bytes. Raises as `read`."""
        with self._at_rest(name) as (file, size_bytes):
            left_bytes = size_bytes
            while left_bytes:
                if not (part := file.read(min(left_bytes, _PART_BYTES))):
                    raise FolderChangedError(self.name)
                into.write(part)
                left_bytes -= len(part)
        return size_bytes

    def close(self) -> None:
        """Close the files that were opened."""
        for file in self._files.values():
            file.close()

    def refuse_changed(self) -> None:
        """Refuse the files that were opened unless all are in it still, so that they belong together.

        Raises:
            FolderChangedError: one was exchanged or removed since it was opened.
        """
        for name, before in self._looks.items():
            try:
                now = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
            except OSError:
                raise FolderChangedError(self.name) from None
            if _identity(now) != _identity(before):
                raise FolderChangedError(self.name)

    @contextmanager
    def _at_rest(self, name: str) -> Iterator[tuple[BinaryIO, int]]:
        """The file and its size in bytes, unless somebody writes it during the block."""
        file = self.file(name)
        before = os.fstat(file.fileno())
        yield file, before.st_size
        if _identity(os.fstat(file.fileno())) != _identity(before):
            raise FolderChangedError(self.name)

    def _open(self, name: str) -> tuple[os.stat_result, BinaryIO]:
        """How the file, or the link to it, looked when it was opened, and the file."""
        if os.path.basename(name) != name or name in ("", os.curdir, os.pardir):
            raise _none_called(name)
        try:
            look = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
            if self.root is None or not stat.S_ISLNK(look.st_mode):
                return look, _regular(name, self._descriptor, follow=self.root is None)
            path = resolved_in(self.root, self.path / name, f"{self.name}/{name}")
            with open_directory(self.root, path.parent) as descriptor:
                return look, _regular(path.name, descriptor, follow=False)
        except (NotADirectoryError, ValueError):  # a link through a file; an embedded null character
            raise _none_called(name) from None


@contextmanager
def open_folder(path: str | Path, root: Path | None = None) -> Iterator[OpenFolder]:
    """The folder at `path`, open for the block.

    With a `root`, which is an absolute path without links, it lies in it, and so do the files that it opens,
    whatever is swapped meanwhile. Without one, links are followed anywhere.

    Raises:
        FileNotFoundError, NotADirectoryError: there is none.
        OutsideRootError: it lies outside of `root`.
        FolderChangedError: something on its way became a link while it was opened.
        OSError: it cannot be opened.
    """
    if root is None:
        path = Path(path)
        descriptor = os.open(path, _FOLDER)
        try:
            with closing(OpenFolder(descriptor, path, None)) as folder:
                yield folder
        finally:
            os.close(descriptor)
        return
    path = resolved_in(root, root / path, Path(path).name)
    with open_directory(root, path) as descriptor, closing(OpenFolder(descriptor, path, root)) as folder:
        yield folder


@contextmanager
def opened(directory: str | Path | OpenFolder) -> Iterator[OpenFolder]:
    """`directory` itself if it is open, else the folder at this path, which may lie anywhere.

    Raises:
        InvalidAdapterError: there is none; because of an OSError, if it cannot be opened.
    """
    if isinstance(directory, OpenFolder):
        yield directory
        return
    name = Path(directory).name
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(open_folder(directory))
        except (FileNotFoundError, NotADirectoryError):
            raise InvalidAdapterError(name, ["expected a folder of this name, there is none"]) from None
        except OSError as error:
            raise InvalidAdapterError(name, [f"cannot be read: {error.strerror}"]) from error
        yield folder


@contextmanager
def open_directory(root: Path, path: Path) -> Iterator[int]:
    """A descriptor of the folder at `path`, which is `root` or lies under it; both are without links.

    Raises:
        FolderChangedError: there is a link on its way, so that it may lead elsewhere by now.
        FileNotFoundError, NotADirectoryError, OSError: it cannot be opened.
    """
    parts = [*root.parts, *path.relative_to(root).parts]
    descriptor = os.open(parts[0], _ON_THE_WAY if len(parts) > 1 else _FOLDER)
    try:
        for at, part in enumerate(parts[1:], 2):
            flags = _ON_THE_WAY if at < len(parts) else _FOLDER | os.O_NOFOLLOW
            inner = _unlinked(part, flags, descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def resolved_in(root: Path, path: Path, shown: str) -> Path:
    """Where `path` leads now, which `shown` calls in errors. It may lead elsewhere before it is opened.

    Raises:
        OutsideRootError: that is not under `root`, which is an absolute path without links.
        FolderChangedError: a link on its way was exchanged meanwhile.
    """
    try:
        resolved = Path(os.path.realpath(path))
    except ValueError:  # an embedded null character
        raise OutsideRootError(shown) from None
    except OSError:  # it was a link, and is none any more
        raise FolderChangedError(shown) from None
    if root not in resolved.parents:
        raise OutsideRootError(shown)
    return resolved


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _unlinked(name: str, flags: int, folder: int) -> int:
    """A descriptor of what is called `name` in an open folder, if it is no link."""
    try:
        return os.open(name, flags, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK) and _is_link(name, folder):
            raise FolderChangedError(name) from error
        raise


def _is_link(name: str, folder: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return True  # it was there a moment ago


def _regular(name: str, folder: int, follow: bool) -> BinaryIO:
    if not stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=follow).st_mode):
        raise _none_called(name)
    if follow:
        descriptor = os.open(name, _FILE, dir_fd=folder)
    else:
        descriptor = _unlinked(name, _FILE | os.O_NOFOLLOW, folder)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    raise _none_called(name)


def _none_called(name: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
