"""Writes a complete model folder under the models root: whole, or not at all.

Knows nothing of adapters. Runs on a worker thread.
"""

from __future__ import annotations

import copy
import errno
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import save

from adapters_core.files import new_folder
from adapters_core.layers.modules import ModuleKind, is_quantized, kind_of
from server.engine.model import ModelInfo

from .folders import SavedFolders

__all__ = ["ModelDraft", "config_of"]

_QUANTIZATION = ("quantization", "quantization_config")
_REST_BYTES = 32 * 2**20  # config, tokenizer, index, with room to spare


class ModelDraft:
    """A model folder called `name` that is to be written, and how much of it there is.

    Raises as `SavedFolders.check`, at once.
    """

    def __init__(self, folders: SavedFolders, name: str) -> None:
        self._folders = folders
        self._name = name
        self._temporary: Path | None = None
        folders.check(name)

    @staticmethod
    def expected_bytes(model: nn.Module) -> int:
        """Bytes of all weights, which is nearly all that a folder takes."""
        return sum(array.nbytes for array in _weights(model).values())

    def written_bytes(self) -> int:
        """Bytes of the weights that are in the folder by now; any thread may ask."""
        folder = self._temporary
        with suppress(OSError):  # it is renamed or removed meanwhile
            return 0 if folder is None else _weight_bytes(folder)
        return 0

    def write(self, model: nn.Module, info: ModelInfo) -> None:
        """Save `model`, with the tokenizer and config of `info`, as a folder that mlx-lm loads.

        Raises:
            PathNotAllowedError, ModelExistsError: as `SavedFolders.check`.
            ModelNotSavedError: it cannot be written, and nothing is left behind.
        """
        expected_bytes = self.expected_bytes(model)
        with (
            self._folders.saving(self._name, expected_bytes + _REST_BYTES) as path,
            new_folder(path, follow=False) as temporary,
        ):
            self._temporary = temporary
            try:
                config = config_of(info.config, model)
                save(temporary, info.path, model, info.tokenizer, config, donate_model=False)
                if _weight_bytes(temporary) < expected_bytes:
                    raise OSError(errno.EIO, "some of the weights were not stored")
            finally:
                self._temporary = None  # the path is another folder's soon


def config_of(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """`config` with the quantisation that the modules of `model` really have.

    mlx-lm quantises a module as the entry for its path says, or by the shape of its tensors if there is none.
    """
    described = copy.deepcopy(config)
    if not any(is_quantized(module) for _, module in model.named_modules()):
        for key in _QUANTIZATION:
            described.pop(key, None)
        return described
    quantization = described.get(_QUANTIZATION[0])
    if isinstance(quantization, dict):
        usual = {key: quantization.get(key, "affine") for key in ("group_size", "bits", "mode")}
        for path, module in model.named_modules():
            actual = _quantization_of(module)
            # Only what is quantised otherwise than the rest needs an entry of its own.
            if path in quantization or (actual and actual != usual):
                quantization[path] = actual
    return described


def _quantization_of(module: nn.Module) -> dict[str, Any] | bool:
    if not is_quantized(module):
        return False
    found = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    if kind_of(module) is ModuleKind.SPLIT:
        del found["mode"]  # mlx-lm's are affine, and fail to load where one is named
    return found


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _weights(model: nn.Module) -> dict[str, mx.array]:
    return dict(cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters())))
