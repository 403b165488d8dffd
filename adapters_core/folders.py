"""Adapter folders: which format a folder is in, and both of its files read at once.

The config decides by its content: PEFT's has `peft_type`. The weights of each format lie in a file of its own
name. Runs on any thread.
"""

from __future__ import annotations

from pathlib import Path

from .config import CONFIG_FILE, AdapterConfig, read_values
from .errors import InvalidAdapterError
from .formats import AdapterFormat
from .mlx_format import MlxFormat
from .peft_config import PeftConfig
from .peft_format import PeftFormat
from .weights import PEFT_WEIGHTS_FILE, WEIGHTS_FILE, read_weights

__all__ = ["read_adapter"]


def read_adapter(directory: Path) -> tuple[AdapterFormat, str]:
    """The adapter in `directory`, and the digest of its tensors ("sha256:…").

    Raises:
        InvalidAdapterError: naming the folder and every problem of both files.
    """
    problems: list[str] = []
    values: object = None
    config: AdapterConfig | PeftConfig | None = None
    weights = None
    try:
        values = read_values(directory / CONFIG_FILE, directory.name)
        config = _config(values, directory.name)
    except InvalidAdapterError as error:
        problems += error.problems
    try:
        weights = read_weights(directory, PEFT_WEIGHTS_FILE if _is_peft(values) else WEIGHTS_FILE)
    except InvalidAdapterError as error:
        problems += error.problems
    if config is None or weights is None:
        raise InvalidAdapterError(directory.name, problems)
    if isinstance(config, PeftConfig):
        return PeftFormat(config, weights.tensors), weights.digest
    return MlxFormat(config, weights.tensors), weights.digest


def _config(values: object, source: str) -> AdapterConfig | PeftConfig:
    if isinstance(values, dict) and _is_peft(values):
        return PeftConfig.from_values(values, source)
    return AdapterConfig.from_values(values, source)


def _is_peft(values: object) -> bool:
    return isinstance(values, dict) and "peft_type" in values
