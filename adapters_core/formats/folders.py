"""Adapter folders as one of the formats that a container works with. Runs on any thread."""

from __future__ import annotations

from ..open_folder import OpenFolder
from .mlx import MlxFormat
from .peft.config import PeftConfig
from .peft.format import PeftFormat
from .protocol import AdapterFormat
from .reading import read_files

__all__ = ["read_adapter"]


def read_adapter(folder: OpenFolder, weights_file: str | None = None) -> tuple[AdapterFormat, str]:
    """The adapter in `folder`, and the digest of its tensors ("sha256:…").

    The tensors are those of `weights_file`, such as a checkpoint, or those in the format's own file.

    Raises:
        InvalidAdapterError: naming the folder and every problem of both files.
        FolderChangedError, OutsideRootError: as `OpenFolder.read`.
    """
    config, weights = read_files(folder, weights_file)
    if isinstance(config, PeftConfig):
        return PeftFormat(config, weights.tensors), weights.digest
    return MlxFormat(config, weights.tensors), weights.digest
