"""Writes a complete model folder under the models root: whole, or not at all.

Knows nothing of adapters. Runs on a worker thread; `bare_copy` on the thread that owns the model.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import save

from adapters_core.targets import Wrapper
from server.engine.model import ModelInfo

from .errors import ModelExistsError, ModelNotSavedError, PathNotAllowedError, quoted

__all__ = ["SavedModels", "bare_copy", "config_of"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding)
_QUANTIZATION = ("quantization", "quantization_config")


class SavedModels:
    """The folder in which models are saved; None: nowhere."""

    def __init__(self, root: Path | None) -> None:
        self._root = root

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

    def write(self, name: str, model: nn.Module, info: ModelInfo) -> None:
        """Save `model`, with the tokenizer and config of `info`, as a folder that mlx-lm loads.

        Raises:
            As `check`; ModelNotSavedError: it cannot be written, and nothing is left behind.
        """
        path = self.check(name)
        temporary = path.with_name(f".{name}.{uuid.uuid4().hex}")
        try:
            save(
                temporary, info.path, model, info.tokenizer, config_of(info.config, model), donate_model=False
            )
            os.rename(temporary, path)
        except OSError as error:
            self.check(name)  # another call may have been faster
            raise ModelNotSavedError(name, error.strerror or "the file system refused") from error
        except RuntimeError as error:  # MLX's own, which names the path
            raise ModelNotSavedError(name, "the weights could not be stored") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def bare_copy(model: nn.Module) -> Any:
    """A copy of the module tree that shares all arrays, with what stands in for base modules taken off."""
    if isinstance(model, list):
        return [bare_copy(child) for child in model]
    if isinstance(model, tuple):
        return tuple(bare_copy(child) for child in model)
    if not isinstance(model, dict):
        return model
    if isinstance(model, Wrapper):
        model = model.reverted()
    twin = copy.copy(model)
    for key, child in model.items():
        twin[key] = bare_copy(child)
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
        for path, module in model.named_modules():
            if path in quantization:
                quantization[path] = _quantization_of(module)
    return described


def _quantization_of(module: nn.Module) -> dict[str, Any] | bool:
    if not isinstance(module, _QUANTIZED):
        return False
    return {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}


def _refused(message: str) -> PathNotAllowedError:
    error = PathNotAllowedError(message)
    error.param = "save_to"
    return error
