"""One adapter: read or newly made, checked against a model, loaded into it, fused, taken out, saved.

Knows nothing of other adapters in the same batch (the bank's affair), of names, or of requests. What
changes a model runs on the thread that owns it; reading, checking and saving may run on any.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Self

import mlx.core as mx
import mlx.nn as nn

from .config import CONFIG_FILE, AdapterConfig, FineTuneType
from .errors import ContainerStateError, InvalidAdapterError
from .layers import LinearWeights, LoRALayer
from .targets import Wrapper, find_targets, linear_shape
from .weights import AdapterWeights, read_weights

__all__ = ["AdapterContainer", "LinearWeights"]


class AdapterContainer:
    """An adapter's config and tensors, and whether they are in a model now.

    Made by `from_directory` or `from_model`. A call that fails changes nothing.
    """

    def __init__(self, config: AdapterConfig, weights: AdapterWeights, source: str) -> None:
        self._config = config
        self._tensors = weights.tensors
        self._tensors_digest = weights.digest
        self._size_bytes = weights.size_bytes
        self._source = source

    @classmethod
    def from_directory(cls, directory: str | Path) -> Self:
        """Read a folder with adapter_config.json and adapters.safetensors, as mlx-lm writes it.

        Raises:
            InvalidAdapterError: naming the folder and every problem of both files.
        """
        directory = Path(directory)
        problems: list[str] = []
        config = weights = None
        try:
            config = AdapterConfig.from_directory(directory)
        except InvalidAdapterError as error:
            problems += error.problems
        try:
            weights = read_weights(directory)
        except InvalidAdapterError as error:
            problems += error.problems
        if config is None or weights is None:
            raise InvalidAdapterError(directory.name, problems)
        return cls(config, weights, directory.name)

    @property
    def config(self) -> AdapterConfig:
        """What adapter_config.json says."""
        return self._config

    @property
    def parameters(self) -> dict[str, mx.array]:
        """The tensors by path in the model, as mlx-lm names them."""
        return dict(self._tensors)

    @property
    def digest(self) -> str:
        """ "sha256:…" of what the adapter computes: its tensors, and the fields of the config that matter."""
        parameters = self._config.lora_parameters
        meaning = [
            self._config.fine_tune_type.value,
            self._config.num_layers,
            parameters.rank,
            parameters.scale,
            parameters.keys,
            self._tensors_digest,
        ]
        return f"sha256:{hashlib.sha256(json.dumps(meaning).encode()).hexdigest()}"

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return self._size_bytes

    def check(self, model: nn.Module) -> dict[str, LinearWeights]:
        """What this adapter brings to each linear layer of `model`, by path. Changes nothing.

        Raises:
            InvalidAdapterError: it does not fit: tensors that are missing, left over or of another shape,
                keys that match nothing, modules that cannot be adapted. Every problem is listed.
            UnsupportedModelError: the model's layers cannot be reached.
            ContainerStateError: another adapter is loaded into the model.
        """
        _require_no_adapter(model)
        targets, problems = find_targets(model, self._config)
        rank = self._config.lora_parameters.rank
        is_dora = self._config.fine_tune_type is FineTuneType.DORA
        tensors = self.parameters
        expected: dict[str, tuple[int, ...]] = {}
        for path, linear in targets.items():
            rows, columns = linear_shape(linear)
            expected[f"{path}.lora_a"] = (columns, rank)
            expected[f"{path}.lora_b"] = (rank, rows)
            if is_dora:
                expected[f"{path}.m"] = (rows,)
        for name, shape in expected.items():
            if name not in tensors:
                problems.append(f"tensor {name}: expected shape {shape}, the file has none of this name")
            elif tensors[name].shape != shape:
                problems.append(
                    f"tensor {name}: expected shape {shape} (rank {rank}), got {tensors[name].shape}"
                )
        known = {path for path, _ in model.named_modules()}
        problems += [
            _left_over(name, known, self._config) for name in sorted(tensors) if name not in expected
        ]
        if problems:
            raise InvalidAdapterError(self._source, problems)
        scale = self._config.lora_parameters.scale
        return {
            path: LinearWeights(
                tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"], tensors.get(f"{path}.m"), scale
            )
            for path in targets
        }


def _require_no_adapter(model: nn.Module) -> None:
    """Refuse a model that carries an adapter, ours or another library's: adapters are never stacked."""
    carriers = [
        path
        for path, module in model.named_modules()
        if isinstance(module, LoRALayer) or ("lora_a" in module and not isinstance(module, Wrapper))
    ]
    if carriers:
        raise ContainerStateError(
            f"expected a model without an adapter, but {len(carriers)} module(s) carry one, first "
            f"{carriers[0]}; unload it first"
        )


def _left_over(name: str, modules: set[str], config: AdapterConfig) -> str:
    path, _, leaf = name.rpartition(".")
    if leaf == "m" and config.fine_tune_type is FineTuneType.LORA and path in modules:
        return f"tensor {name}: not expected: a magnitude, but fine_tune_type is lora (dora has magnitudes)"
    if leaf not in ("lora_a", "lora_b", "m"):
        return f"tensor {name}: not expected: not the name of an adapter's tensor (lora_a, lora_b, m)"
    if path not in modules:
        return f"tensor {name}: not expected: the model has no module {path}"
    return (
        f"tensor {name}: not expected: {CONFIG_FILE} leaves this module out "
        f"(num_layers {config.num_layers}, keys {config.lora_parameters.keys})"
    )
