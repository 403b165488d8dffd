"""Writes a complete model folder under the models root: whole, or not at all.

Knows nothing of adapters. Runs on a worker thread; `bare_copy` on the thread that owns the model.
"""

from __future__ import annotations

import copy
import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import save

from adapters_core.layers.targets import Wrapper
from server.engine.model import ModelInfo

from .errors import ModelExistsError, ModelNotSavedError, PathNotAllowedError, quoted

__all__ = ["ModelDraft", "SavedModels", "bare_copy", "config_of"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
_QUANTIZATION = ("quantization", "quantization_config")
_REST_BYTES = 32 * 2**20  # config, tokenizer, index, with room to spare


class SavedModels:
    """The folder in which models are saved; None: nowhere. `free_bytes` says how much fits into a folder."""

    def __init__(
        self,
        root: Path | None,
        free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
    ) -> None:
        self._root = root
        self._free_bytes = free_bytes

    def check(self, name: str) -> Path:
        """Where a model called `name` would go.

        Raises:
            PathNotAllowedError: there is no models root, or `name` is not that of a folder in it.
            ModelExistsError: something of this name is there.
        """
        if self._root is None:
            raise _refused(
                "This server has no models root, so no model can be saved; set it with --models-dir."
            )
        if not _NAME.fullmatch(name):
            raise _refused(
                f"{quoted(name)} cannot be the name of a saved model: expected 1 to 128 letters, digits, "
                "'.', '_' or '-', beginning with a letter or digit."
            )
        path = self._root / name
        if os.path.lexists(path):
            raise ModelExistsError(name)
        return path

    def draft(self, name: str) -> ModelDraft:
        """A model called `name` that is to be written. Raises as `check`."""
        return ModelDraft(self, name, self.check(name), self._free_bytes)


class ModelDraft:
    """A model folder under a temporary name beside its own, until it is complete."""

    def __init__(self, models: SavedModels, name: str, path: Path, free_bytes: Callable[[Path], int]) -> None:
        self._models = models
        self._name = name
        self._path = path
        self._temporary = path.with_name(f".{name}.{uuid.uuid4().hex}")
        self._free_bytes = free_bytes

    @staticmethod
    def expected_bytes(model: nn.Module) -> int:
        """Bytes of all weights, which is nearly all that a folder takes."""
        return sum(array.nbytes for array in _weights(model).values())

    def written_bytes(self) -> int:
        """Bytes of the weights that are in the folder by now; any thread may ask."""
        with suppress(OSError):  # it is renamed or removed meanwhile
            return sum(file.stat().st_size for file in self._temporary.glob("*.safetensors"))
        return 0

    def write(self, model: nn.Module, info: ModelInfo) -> None:
        """Save `model`, with the tokenizer and config of `info`, as a folder that mlx-lm loads.

        Raises:
            PathNotAllowedError, ModelExistsError: as `SavedModels.check`.
            ModelNotSavedError: it cannot be written, and nothing is left behind.
        """
        self._models.check(self._name)
        temporary = self._temporary
        try:
            self._require_room(model)
            save(
                temporary, info.path, model, info.tokenizer, config_of(info.config, model), donate_model=False
            )
            _make_durable(temporary, self.expected_bytes(model))
            os.rename(temporary, self._path)
        except OSError as error:
            self._models.check(self._name)  # another call may have been faster
            raise ModelNotSavedError(self._name, error.strerror or "the file system refused") from error
        except RuntimeError as error:  # MLX's own, which names the path
            raise ModelNotSavedError(self._name, "the weights could not be stored") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _require_room(self, model: nn.Module) -> None:
        needed_bytes = self.expected_bytes(model) + _REST_BYTES
        free_bytes = self._free_bytes(self._path.parent)
        if needed_bytes > free_bytes:
            raise ModelNotSavedError(
                self._name, f"it takes about {needed_bytes} bytes, and {free_bytes} are free"
            )


def _make_durable(folder: Path, weights_bytes: int) -> None:
    """Wait until the files are on the disk. Raises OSError if weights are missing."""
    if sum(file.stat().st_size for file in folder.glob("*.safetensors")) < weights_bytes:
        raise OSError(errno.EIO, "some of the weights were not stored")
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _weights(model: nn.Module) -> dict[str, mx.array]:
    return dict(cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters())))


def bare_copy(model: nn.Module) -> Any:
    """A copy of the module tree that shares all arrays, with what stands in for base modules taken off.

    A module that hangs in several places does so in the copy too.
    """
    return _copied(model, {})


def _copied(model: Any, copies: dict[int, Any]) -> Any:
    if isinstance(model, list):
        return [_copied(child, copies) for child in model]
    if isinstance(model, tuple):
        return tuple(_copied(child, copies) for child in model)
    if not isinstance(model, dict):
        return model
    if isinstance(model, Wrapper):
        model = model.reverted()
    if id(model) in copies:
        return copies[id(model)]
    twin = copies[id(model)] = copy.copy(model)
    for key, child in model.items():
        twin[key] = _copied(child, copies)
    return twin


def config_of(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """`config` with the quantisation that the modules of `model` really have.

    mlx-lm quantises a module as the entry for its path says, or by the shape of its tensors if there is none.
    """
    described = copy.deepcopy(config)
    if not any(isinstance(module, _QUANTIZED) for _, module in model.named_modules()):
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
    if not isinstance(module, _QUANTIZED):
        return False
    return {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}


def _refused(message: str) -> PathNotAllowedError:
    error = PathNotAllowedError(message)
    error.param = "save_to"
    return error
