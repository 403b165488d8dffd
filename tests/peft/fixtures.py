"""The models, adapters and logits that `make_fixtures.py` made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_model

__all__ = ["ADAPTERS", "adapter", "base_of", "changed", "expected", "model", "model_folder", "tokens"]

_FOLDER = Path(__file__).parent / "fixtures"
ADAPTERS = sorted(path.name for path in (_FOLDER / "adapters").iterdir())


def model(name: str) -> nn.Module:
    """A fresh copy of the model, float32, in eval mode."""
    found = load_model(model_folder(name))[0]
    found.eval()
    return found


def model_folder(name: str) -> Path:
    """The model's folder."""
    return _FOLDER / "models" / name


def adapter(name: str) -> Path:
    """The adapter's folder."""
    return _FOLDER / "adapters" / name


def base_of(name: str) -> str:
    """The model that the adapter was made for."""
    config = json.loads((adapter(name) / "adapter_config.json").read_text())
    return config["base_model_name_or_path"].removeprefix("tiny/")


def expected(name: str) -> np.ndarray:
    """PEFT's logits for `tokens`, (3, 6, vocabulary), float32."""
    return np.array(_load(adapter(name) / "expected.safetensors")["logits"])


def tokens() -> mx.array:
    """The token ids, (3, 6)."""
    return mx.array(json.loads((_FOLDER / "tokens.json").read_text()))


def changed(
    directory: Path,
    name: str,
    config: dict[str, Any] | None = None,
    tensors: Callable[[dict[str, mx.array]], dict[str, mx.array]] | None = None,
) -> Path:
    """A copy of the adapter `name` in `directory`, with fields of its config and its tensors changed."""
    shutil.copytree(adapter(name), directory, dirs_exist_ok=True)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    if tensors is not None:
        file = directory / "adapter_model.safetensors"
        mx.save_safetensors(str(file), tensors(_load(file)))
    return directory


def _load(file: Path) -> dict[str, mx.array]:
    tensors = cast("dict[str, mx.array]", mx.load(str(file)))
    mx.eval(tensors)
    return dict(tensors)
