"""Which ids an adapter may have, and which folder an id or a path leads to.

A path from a request leads, symbolic links followed, to a place under the adapters root or it is refused;
so do the files in the folder. A folder that the operator named at the start may lie anywhere. Knows no
adapter's contents. Reads the file system, so it runs on a worker thread.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from adapters_core.config import CONFIG_FILE
from adapters_core.errors import AdapterError, FolderChangedError, InvalidAdapterError, OutsideRootError
from adapters_core.formats.weights import PEFT_WEIGHTS_FILE, WEIGHTS_FILE
from adapters_core.open_folder import OpenFolder, open_folder, resolved_in
from server.resources import is_exhaustion

from .errors import (
    AdapterNotFoundError,
    InvalidAdapterIdError,
    LifeCycleError,
    PathNotAllowedError,
    quoted,
    some_of,
)

__all__ = ["RESERVED_IDS", "AdapterFolder", "AdapterFolders", "check_id", "configured_folders", "is_valid_id"]

RESERVED_IDS = frozenset({"default", "active"})
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# As vLLM's clients name adapters: owner/name, or the path of a folder.
_PATH_ID = re.compile(r"(?:/|(?=[A-Za-z0-9]))(?:(?!\.+(?:/|\Z))[A-Za-z0-9._-]+(?:/|\Z))+(?<!/)")
_PATH_CHARS = 255
_CALLS = frozenset({"fuse", "rollback", "save"})
_STEP_FILE_END = "_adapters.safetensors"
# Checkpoints as mlx-lm's trainer names them, and as PEFT's users' trainer does.
_STEP_NAME = re.compile(r"([0-9]{7,18})_adapters\.safetensors|checkpoint-([0-9]{1,18})")


def check_id(adapter_id: str, base: str) -> None:
    """Accept `adapter_id` as an adapter's id beside the base model `base`.

    Raises:
        InvalidAdapterIdError: it does not match, or it means something else already.
    """
    is_path = len(adapter_id) <= _PATH_CHARS and "/" in adapter_id and _PATH_ID.fullmatch(adapter_id)
    if not (is_path or _ID.fullmatch(adapter_id)):
        raise InvalidAdapterIdError(
            adapter_id,
            "expected 1 to 128 letters, digits, '.', '_' or '-', beginning with a letter or digit, or such "
            "names with '/' between them",
        )
    if is_path and adapter_id.rpartition("/")[2] in _CALLS:
        raise InvalidAdapterIdError(adapter_id, "its URL would be that of a call")
    if adapter_id in RESERVED_IDS:
        raise InvalidAdapterIdError(adapter_id, "the name is reserved")
    if adapter_id == base:
        raise InvalidAdapterIdError(adapter_id, "it is the base model's name")


def is_valid_id(adapter_id: str, base: str) -> bool:
    """Whether `check_id` accepts it."""
    try:
        check_id(adapter_id, base)
    except InvalidAdapterIdError:
        return False
    return True


_NOT_THERE = (AdapterNotFoundError, PathNotAllowedError, FolderChangedError)


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """A folder that may be read: where it is, and how clients see it (relative to the root, no more).

    It and its files lie in `root`; None: the operator named it, so that it may lie anywhere. `weights_file`
    is the name of the file that is read in the place of the adapter's own: a checkpoint beside it.
    `scale` was given by whoever asked, and stands in place of the one in a config in mlx-lm's format.
    """

    path: Path
    shown: str
    root: Path | None = None
    weights_file: str | None = None
    scale: float | None = None

    @property
    def file_names(self) -> tuple[str, ...]:
        """The files that an adapter in it may consist of."""
        weights = (WEIGHTS_FILE, PEFT_WEIGHTS_FILE) if self.weights_file is None else (self.weights_file,)
        return (CONFIG_FILE, *weights)

    @contextmanager
    def open(self) -> Iterator[OpenFolder]:
        """The folder, open for the block, in which what is swapped meanwhile changes nothing.

        Raises:
            AdapterNotFoundError: it has gone.
            OutsideRootError, FolderChangedError: as `open_folder`.
            InvalidAdapterError: because of an OSError; it cannot be opened.
            OSError: the system gives no more of something, which says nothing of the folder.
        """
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(open_folder(self.path, self.root))
            except (FileNotFoundError, NotADirectoryError):
                raise AdapterNotFoundError(f"There is no folder {quoted(self.shown)} any more.") from None
            except OSError as error:
                if is_exhaustion(error):
                    raise
                raise InvalidAdapterError(self.path.name, [f"cannot be read: {error.strerror}"]) from error
            yield folder


class AdapterFolders:
    """The folders under `root` (None: there are none), and those in `configured`, by id, anywhere.

    `scales` are what the operator gave by id, for folders that are not named by a path.
    """

    def __init__(
        self,
        root: Path | None,
        configured: Mapping[str, Path] | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        self._scales = dict(scales or {})
        self._root = None if root is None else Path(os.path.realpath(root))
        self._configured = {name: Path(os.path.realpath(path)) for name, path in (configured or {}).items()}

    def find(self, adapter_id: str, path: str | None = None, scale: float | None = None) -> AdapterFolder:
        """The folder at `path` in the root; without it the configured one, or the one named as the id.

        `scale` is that of the adapter in it; without one, what the operator gave for the id.

        Raises:
            PathNotAllowedError: the path, or a file in the folder, lies outside the root.
            AdapterNotFoundError: there is no such folder.
            FolderChangedError: a link on the way was exchanged meanwhile.
        """
        found = self._found(adapter_id, path)
        if scale is None and path in (None, adapter_id):
            scale = self._scales.get(adapter_id)
        return replace(found, scale=scale)

    def _found(self, adapter_id: str, path: str | None) -> AdapterFolder:
        """As `find`, without a scale."""
        if path is None and adapter_id in self._configured:
            folder = self._configured[adapter_id]
            return self._existing(folder, self._shown(folder), None)
        wanted = adapter_id if path is None else path
        if self._root is None:
            raise PathNotAllowedError(
                "This server has no adapters root, so no folder can be loaded; it is set with --adapters-dir."
            )
        folder = _inside(self._root, wanted, wanted)
        found = self._existing(folder, wanted, self._root)
        for name in (CONFIG_FILE, WEIGHTS_FILE, PEFT_WEIGHTS_FILE):
            _inside(self._root, folder / name, f"{wanted}/{name}")
        return found

    def again(self, folder: AdapterFolder) -> AdapterFolder:
        """A folder that was found before, checked as it is now. Raises as `find`."""
        if folder.root is None:
            found = self._existing(folder.path, folder.shown, None)
        else:
            found = self._found(folder.shown, folder.shown)
        found = replace(found, scale=folder.scale)
        return found if folder.weights_file is None else self._checkpoint_file(found, folder.weights_file)

    def on_demand(self, adapter_id: str) -> AdapterFolder | None:
        """The adapter's folder directly under the root with this very name, if it may be read."""
        if self._root is None or "/" in adapter_id:
            return None
        if not os.path.isfile(self._root / adapter_id / CONFIG_FILE):
            return None
        # A file system that ignores case would find the folder under many names.
        if adapter_id not in self._names():
            return None
        try:
            return self.find(adapter_id, adapter_id)
        except _NOT_THERE:
            return None

    def checkpoint(self, adapter_id: str, step: int, parent: AdapterFolder | None) -> AdapterFolder | None:
        """What the training of an adapter wrote at `step`, if it may be read.

        It lies in `parent`, or without one in the folder directly under the root that is named as the id.
        """
        try:
            parent = self._trained_into(adapter_id) if parent is None else parent
            name = None if parent is None else _written_at(parent.path, step)
            if parent is None or name is None:
                return None
            if name.endswith(_STEP_FILE_END):
                return self._checkpoint_file(parent, name)
            if parent.root is None:
                return self._existing(parent.path / name, f"{parent.shown}/{name}", None)
            return self.find(adapter_id, f"{parent.shown}/{name}")
        except _NOT_THERE:
            return None

    def steps_of(self, adapter_id: str, parent: AdapterFolder | None) -> list[int]:
        """The steps of what `checkpoint` finds."""
        with suppress(*_NOT_THERE):
            parent = self._trained_into(adapter_id) if parent is None else parent
            return [] if parent is None else self.steps(parent)
        return []

    def steps(self, folder: AdapterFolder) -> list[int]:
        """The steps at which a training wrote checkpoints into `folder`, upwards."""
        try:
            with folder.open() as files:
                names = files.names()
        except (OSError, AdapterError, LifeCycleError) as error:
            if is_exhaustion(error):
                raise
            return []
        found = (_STEP_NAME.fullmatch(name) for name in names)
        steps = {int(match[1] or match[2]) for match in found if match is not None}
        return sorted(step for step in steps if _written_at(folder.path, step) is not None)

    def trainings(self, base: str) -> dict[str, list[int]]:
        """The steps of each folder directly under the root that holds checkpoints."""
        found: dict[str, list[int]] = {}
        for name in self._names():
            if is_valid_id(name, base):
                with suppress(*_NOT_THERE):
                    found[name] = self.steps(self.find(name, name))
        return {name: steps for name, steps in found.items() if steps}

    def available(self, base: str, loaded: Collection[str]) -> list[str]:
        """Ids of the folders directly under the root that look like adapters and are not in `loaded`."""
        return [
            name
            for name in self._names()
            if name not in loaded and is_valid_id(name, base) and self._looks_like_adapter(name)
        ]

    def _names(self) -> list[str]:
        """What lies directly under the root, in order; nothing if it cannot be listed.

        Raises: OSError: the system gives no more of something, which says nothing of the root.
        """
        try:
            return [] if self._root is None else sorted(os.listdir(self._root))
        except OSError as error:
            if is_exhaustion(error):
                raise
            return []

    def _trained_into(self, adapter_id: str) -> AdapterFolder | None:
        """The folder directly under the root with this very name. Raises as `find`."""
        if self._root is None or "/" in adapter_id or not os.path.isdir(self._root / adapter_id):
            return None
        # A file system that ignores case would find the folder under many names.
        return self.find(adapter_id, adapter_id) if adapter_id in self._names() else None

    def _checkpoint_file(self, folder: AdapterFolder, name: str) -> AdapterFolder:
        if folder.root is not None:
            _inside(folder.root, folder.path / name, f"{folder.shown}/{name}")
        if not os.path.isfile(folder.path / name):
            raise AdapterNotFoundError(f"There is no file {quoted(name)} in folder {quoted(folder.shown)}.")
        return replace(folder, weights_file=name)

    def _looks_like_adapter(self, name: str) -> bool:
        try:
            return self._root is not None and os.path.isfile(_inside(self._root, name, name) / CONFIG_FILE)
        except _NOT_THERE:
            return False

    def _existing(self, folder: Path, asked: str, root: Path | None) -> AdapterFolder:
        if not os.path.isdir(folder):
            if root is None:
                raise AdapterNotFoundError(f"There is no folder {quoted(asked)}.")
            raise AdapterNotFoundError(
                f"There is no folder {quoted(asked)} under the adapters root. Adapters there are: "
                f"{some_of(self.available('', ()))}."
            )
        return AdapterFolder(folder, self._shown(folder), root)

    def _shown(self, folder: Path) -> str:
        if self._root is not None and self._root in folder.parents:
            return folder.relative_to(self._root).as_posix()
        return folder.name


def configured_folders(adapters: Mapping[str, str], root: Path | None) -> dict[str, Path]:
    """The folders that the operator named for ids: as they are, else those of that name under the root."""
    folders: dict[str, Path] = {}
    for adapter_id, name in adapters.items():
        path = Path(name).expanduser()
        in_root = root is not None and not path.is_dir() and (root / path).is_dir()
        folders[adapter_id] = root / path if root is not None and in_root else path
    return folders


def _written_at(folder: Path, step: int) -> str | None:
    """The name in `folder` of the checkpoint of `step`, with a config to read it by, or None."""
    file, subfolder = f"{step:07d}{_STEP_FILE_END}", f"checkpoint-{step}"
    if os.path.isfile(folder / file) and os.path.isfile(folder / CONFIG_FILE):
        return file
    return subfolder if os.path.isfile(folder / subfolder / CONFIG_FILE) else None


def _inside(root: Path, path: str | Path, shown: str) -> Path:
    """Where `path`, relative to `root`, really is. Raises PathNotAllowedError unless that is under `root`."""
    try:
        return resolved_in(root, root / path, shown)
    except OutsideRootError:
        raise PathNotAllowedError(
            f"The path {quoted(shown)} lies outside the adapters root, or is the root itself. "
            "Name a folder under it, relative to it."
        ) from None
