"""One adapter: read or newly made, checked against a model, loaded into it, fused, taken out, saved.

Knows nothing of other adapters in the same batch (the bank's affair), of names, or of requests. What
changes a model runs on the thread that owns it; reading, checking and saving may run on any.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import mlx.core as mx
import mlx.nn as nn

from .config import CONFIG_FILE, AdapterConfig, FineTuneType
from .errors import ContainerStateError, InvalidAdapterError
from .fusion import FuseReport, Fusion, Precision, fuse_layers
from .layers import DoRALinear, LoRALayer, LoRALinear, adapted, with_weights
from .module_weights import ModuleWeights
from .surgery import Modes, Surgery, copy_modes, replace_modules
from .targets import find_targets, is_wrapper, linear_shape, module_at, named_modules, resolve_targets
from .weights import WEIGHTS_FILE, digest_of, read_weights, save_weights

__all__ = ["AdapterContainer"]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A container's layers in a model; `before` are the model's modes without them."""

    model: nn.Module
    layers: dict[str, LoRALinear | DoRALinear]
    surgery: Surgery
    before: Modes


class AdapterContainer:
    """An adapter's config and tensors, and whether they are in a model now.

    Made by `from_directory` or `from_model`. It can be in one model at a time, alone. A call that fails
    changes nothing.
    """

    def __init__(self, config: AdapterConfig, tensors: Mapping[str, mx.array], source: str) -> None:
        """Use `from_directory` or `from_model`. `tensors` are evaluated; `source` is named in errors."""
        self._config = config
        self._tensors = dict(tensors)
        self._tensors_digest: str | None = None
        self._source = source
        self._loaded: _Loaded | None = None

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
        container = cls(config, weights.tensors, directory.name)
        container._tensors_digest = weights.digest
        return container

    @classmethod
    def from_model(cls, model: nn.Module, config: AdapterConfig) -> Self:
        """A new adapter, in `model` and ready for training.

        The base is frozen, the adapter's parameters alone are trainable, and the model is in training
        mode. The adapter changes nothing yet; its factors are drawn as mlx-lm draws them, from MLX's
        global random state.

        Raises:
            InvalidAdapterError: keys that match nothing, or modules that cannot be adapted.
            UnsupportedModelError: the model's layers cannot be reached.
            ContainerStateError: an adapter is loaded into the model.
        """
        require_bare(model)
        targets = resolve_targets(model, config, "new adapter")
        layers = {path: adapted(linear, config) for path, linear in targets.items()}
        mx.eval([list(_tensors_of(path, layer).values()) for path, layer in layers.items()])
        container = cls(config, {}, "new adapter")
        container._attach(model, layers)
        model.freeze()
        for layer in layers.values():
            layer.unfreeze(recurse=False)
        model.train()
        return container

    @property
    def config(self) -> AdapterConfig:
        """What adapter_config.json says."""
        return self._config

    @property
    def parameters(self) -> dict[str, mx.array]:
        """The tensors by path in the model, as mlx-lm names them; while loaded, as they are in the model."""
        if self._loaded is not None:
            live: dict[str, mx.array] = {}
            for path, layer in self._loaded.layers.items():
                live |= _tensors_of(path, layer)
            if live.keys() != self._tensors.keys() or any(live[n] is not self._tensors[n] for n in live):
                mx.eval(live)
                self._tensors = live
                self._tensors_digest = None
        return dict(self._tensors)

    @property
    def digest(self) -> str:
        """What the adapter computes, as "sha256:…": its tensors and the fields of the config that matter."""
        tensors = self.parameters
        if self._tensors_digest is None:
            self._tensors_digest = digest_of(tensors)
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
        return sum(tensor.nbytes for tensor in self.parameters.values())

    def check(self, model: nn.Module) -> dict[str, ModuleWeights]:
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
        left_over = sorted(tensors.keys() - expected.keys())
        if left_over:
            known = {path for path, _ in named_modules(model)}
            problems += [_left_over(name, known, self._config) for name in left_over]
        if problems:
            raise InvalidAdapterError(self._source, problems)
        scale = self._config.lora_parameters.scale
        return {
            path: ModuleWeights(
                tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"], tensors.get(f"{path}.m"), scale
            )
            for path in targets
        }

    def load(self, into: nn.Module) -> None:
        """Adapt `into`: its targeted linear layers are replaced by layers with this adapter, in eval mode.

        Raises:
            InvalidAdapterError, UnsupportedModelError: as `check`.
            ContainerStateError: this container is loaded already, or the model carries another adapter.
        """
        if self._loaded is not None:
            raise ContainerStateError(f"adapter {self._source!r} is loaded already; unload it first")
        require_bare(into)
        layers = self._layers(into)
        for layer in layers.values():
            if isinstance(layer, DoRALinear):
                layer.settle()
        self._attach(into, layers)
        for layer in layers.values():
            layer.eval()

    def unload(self, from_: nn.Module) -> None:
        """Put the very base modules back, frozen and training as they were before this adapter came.

        Raises:
            ContainerStateError: it is not loaded into this model, or later changes of the model come first.
        """
        loaded = self._loaded
        if loaded is None or loaded.model is not from_:
            where = "any model" if loaded is None else "this model, but into another one"
            raise ContainerStateError(f"adapter {self._source!r} is not loaded into {where}")
        tensors = self.parameters
        loaded.surgery.undo()
        loaded.before.restore()
        self._tensors = tensors
        self._loaded = None

    def fused_modules(
        self, model: nn.Module, precision: Precision = "auto"
    ) -> tuple[dict[str, nn.Module], FuseReport]:
        """Plain layers, by path, that do what `model` with this adapter would do; changes nothing.

        Raises:
            ValueError: there is no such precision.
            InvalidAdapterError, UnsupportedModelError: as `check`; or weights that do not stay finite.
            ContainerStateError: another adapter is loaded into the model.
        """
        here = self._loaded is not None and self._loaded.model is model
        layers = self._loaded.layers if self._loaded is not None and here else self._layers(model)
        return fuse_layers(layers, precision, self._source)

    def fuse(self, with_: nn.Module, precision: Precision = "auto") -> Fusion:
        """Merge this adapter into the model's own layers, whether it is loaded into it or not.

        On quantised layers, "requantize" keeps the quantisation, "dequantize" makes dense layers of the
        base's compute dtype, and "auto" quantises a layer again only if the relative error of its change
        stays within 0.05. Dense layers keep their dtype. The adapter is not loaded afterwards.

        Raises:
            As `fused_modules`; ContainerStateError also if the model carries any other adapter.
        """
        loaded = self._loaded
        if loaded is None or loaded.model is not with_:
            require_bare(with_)
            loaded = None
        modules, report = self.fused_modules(with_, precision)
        during = Modes(with_)
        if loaded is not None:
            self.unload(from_=with_)
        surgery = replace_modules(with_, modules)
        for path, base in surgery.replaced.items():
            copy_modes(base, modules[path])

        def restore() -> None:
            if loaded is not None:
                self._attach(with_, loaded.layers)
                during.restore()

        return Fusion(report, surgery, restore)

    def save(self, directory: str | Path) -> None:
        """Write adapter_config.json and adapters.safetensors, as mlx-lm reads them, into `directory`.

        The folder is made if need be. Each file is replaced in full or not at all, the tensors first.

        Raises:
            OSError: a file cannot be written.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_weights(directory / WEIGHTS_FILE, self.parameters)
        self._config.write(directory / CONFIG_FILE)

    def _layers(self, model: nn.Module) -> dict[str, LoRALinear | DoRALinear]:
        weights = self.check(model)
        return {
            path: with_weights(module_at(model, path), linear, self._config)
            for path, linear in weights.items()
        }

    def _attach(self, model: nn.Module, layers: dict[str, LoRALinear | DoRALinear]) -> None:
        before = Modes(model)
        self._loaded = _Loaded(model, layers, replace_modules(model, dict(layers)), before)


def require_bare(model: nn.Module) -> None:
    """Refuse a model whose modules are wrapped, by an adapter or by a bank: adapters are never stacked.

    Raises:
        ContainerStateError: naming the first such module.
    """
    _refuse(model, lambda module: is_wrapper(module) or "lora_a" in module)


def _require_no_adapter(model: nn.Module) -> None:
    # The wrappers of a bank are seen through: checking an adapter against a served model is its business.
    _refuse(
        model,
        lambda module: isinstance(module, LoRALayer) if is_wrapper(module) else "lora_a" in module,
    )


def _refuse(model: nn.Module, carries: Callable[[nn.Module], bool]) -> None:
    carriers = [path for path, module in named_modules(model) if carries(module)]
    if carriers:
        raise ContainerStateError(
            f"expected a model without an adapter, but {len(carriers)} module(s) carry one, first "
            f"{min(carriers)}; unload it first"
        )


def _tensors_of(path: str, layer: LoRALinear | DoRALinear) -> dict[str, mx.array]:
    weights = layer.weights
    tensors = {f"{path}.lora_a": weights.lora_a, f"{path}.lora_b": weights.lora_b}
    if weights.magnitude is not None:
        tensors[f"{path}.m"] = weights.magnitude
    return tensors


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
