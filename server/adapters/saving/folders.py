"""New folders under a root, of names that clients chose: what name, whether there is one, whether it fits.

Knows nothing of what is written into them; they are made by `adapters_core.files.new_folder`, so that each is
whole or not there. Reads the file system, so it runs on a worker thread.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from adapters_core.errors import FolderChangedError

from ..errors import (
    AdapterFolderExistsError,
    AdapterNotSavedError,
    LifeCycleError,
    ModelExistsError,
    ModelNotSavedError,
    PathNotAllowedError,
    quoted,
)

__all__ = ["ADAPTERS", "MODELS", "SavedFolders", "SavedKind"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class SavedKind:
    """What lies under a root, the flag that sets the root, and what is raised of a folder there."""

    noun: str
    flag: str
    exists: Callable[[str], LifeCycleError]
    not_saved: Callable[[str, str], LifeCycleError]


MODELS = SavedKind("model", "--models-dir", ModelExistsError, ModelNotSavedError)
ADAPTERS = SavedKind("adapter", "--adapters-dir", AdapterFolderExistsError, AdapterNotSavedError)


class SavedFolders:
    """The folder in which `kind` is saved; None: nowhere. `free_bytes` says how much fits into a folder."""

    def __init__(
        self,
        root: Path | None,
        kind: SavedKind,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        self._root = None if root is None else Path(os.path.realpath(root))
        self._kind = kind
        self._free_bytes = free_bytes

    def check(self, name: str) -> Path:
        """Where a folder called `name` would go.

        Raises:
            PathNotAllowedError: there is no root, or `name` is not that of a folder in it.
            LifeCycleError: the kind's own, where something of this name is there.
        """
        noun = self._kind.noun
        if self._root is None:
            raise _refused(
                f"This server has no {noun}s root, so no {noun} can be saved; set it with {self._kind.flag}."
            )
        if not _NAME.fullmatch(name):
            raise _refused(
                f"{quoted(name)} cannot be the name of a saved {noun}: expected 1 to 128 letters, digits, "
                "'.', '_' or '-', beginning with a letter or digit."
            )
        path = self._root / name
        if os.path.lexists(path):
            raise self._kind.exists(name)
        return path

    @contextmanager
    def saving(self, name: str, needed_bytes: int) -> Iterator[Path]:
        """Where the block makes the folder called `name`, which takes about `needed_bytes`.

        Raises:
            As `check`, also for what comes to be there meanwhile.
            LifeCycleError: the kind's own, for too little room and for what the block raises of the disk.
        """
        path = self.check(name)
        try:
            free_bytes = self._free_bytes(next(folder for folder in path.parents if folder.is_dir()))
            if needed_bytes > free_bytes:
                raise self._kind.not_saved(
                    name, f"it takes about {needed_bytes} bytes, and {free_bytes} are free"
                )
            yield path
        except FolderChangedError as error:
            reason = f"the {self._kind.noun}s root, or the way to it, is a link that was none at the start"
            raise self._kind.not_saved(name, reason) from error
        except FileExistsError as error:  # another call was faster
            raise self._kind.exists(name) from error
        except OSError as error:
            raise self._kind.not_saved(name, error.strerror or "the file system refused") from error
        except RuntimeError as error:  # MLX's own, which names the path
            raise self._kind.not_saved(name, "the weights could not be stored") from error


def _refused(message: str) -> PathNotAllowedError:
    error = PathNotAllowedError(message)
    error.param = "save_to"
    return error
