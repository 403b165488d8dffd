"""Adapter folders as one of the formats that a container works with. Runs on any thread."""

from __future__ import annotations

from ..open_folder import OpenFolder
from .mlx import MlxFormat
from .peft.config import PeftConfig
from .peft.format import PeftFormat
from .protocol import AdapterFormat
from .reading import read_files
from .tensor_names import with_todays_shapes

__all__ = ["read_adapter"]


def read_adapter(
    folder: OpenFolder, weights_file: str | None = None, scale: float | None = None
) -> tuple[AdapterFormat, str]:
    """The adapter in `folder`, and the digest of its tensors ("sha256:…").

    The tensors are those of `weights_file`, such as a checkpoint, or those in the format's own file. `scale`
    stands in place of that in a config in mlx-lm's format.

    Raises:
        InvalidAdapterError: naming the folder and every problem of both files.
        FolderChangedError, OutsideRootError: as `OpenFolder.read`.
    """
    config, weights = read_files(folder, weights_file, scale)
    if isinstance(config, PeftConfig):
        return PeftFormat(config, weights.tensors, notes=weights.notes), weights.digest
    tensors = with_todays_shapes(weights.tensors)
    return MlxFormat(config, tensors, notes=weights.notes), weights.digest
