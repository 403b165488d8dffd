"""One adapter: read or newly made, checked against a model, loaded into it, fused, taken out, saved.

Knows nothing of other adapters in the same batch (the bank's affair), of names, or of requests. What
changes a model runs on the thread that owns it; reading, checking and saving may run on any.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import mlx.core as mx
import mlx.nn as nn
from pydantic import JsonValue

from .config import CONFIG_FILE, AdapterConfig, FineTuneType, LoRAParameters
from .errors import ContainerStateError, InvalidAdapterError
from .formats.folders import read_adapter
from .formats.mlx import MlxFormat
from .formats.protocol import AdapterFormat, FormatName, Mapped, ModulesFormat
from .formats.weights import WEIGHTS_FILE, digest_of, save_weights
from .fusing.fusion import FuseReport, Fusion, Precision, fuse_layers
from .layers.kinds import AdaptedLayer, DoRALayer, adapted, is_lora, with_weights
from .layers.module_weights import ModuleWeights
from .layers.surgery import Modes, Surgery, copy_modes, replace_modules
from .layers.targets import is_wrapper, module_at, named_modules, resolve_targets
from .open_folder import OpenFolder, opened

__all__ = ["AdapterContainer"]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A container's layers in a model; `before` are the model's modes without them.

    `weights` are what the layers held when they were last looked at.
    """

    model: nn.Module
    layers: dict[str, AdaptedLayer]
    weights: dict[str, ModuleWeights]
    surgery: Surgery
    before: Modes


class AdapterContainer:
    """An adapter as its format has it, and whether it is in a model now.

    Made by `from_directory`, `from_model` or `from_weights`. It can be in one model at a time, alone. A call
    that fails changes nothing.
    """

    def __init__(self, content: AdapterFormat, source: str, tensors_digest: str | None = None) -> None:
        """Use one of the class methods. `source` is named in errors; the tensors are evaluated."""
        self._content = content
        self._tensors_digest = tensors_digest
        self._source = source
        self._loaded: _Loaded | None = None

    @classmethod
    def from_directory(
        cls,
        directory: str | Path | OpenFolder,
        weights_file: str | None = None,
        scale: float | None = None,
    ) -> Self:
        """Read a folder as mlx-lm or PEFT writes it; adapter_config.json says which of them did.

        `weights_file` names a file in it to be read in the place of the adapter's own, such as a checkpoint.
        `scale` stands in place of the one in a config in mlx-lm's format, whose meaning changed over time.

        Raises:
            InvalidAdapterError: naming the folder and every problem of both files.
            FolderChangedError, OutsideRootError: as `OpenFolder.read`.
        """
        with opened(directory) as folder:
            content, digest = read_adapter(folder, weights_file, scale)
            return cls(content, folder.name, digest)

    @classmethod
    def from_weights(cls, weights: Mapping[str, ModuleWeights], source: str) -> Self:
        """An adapter of modules by their full paths in the model; the arrays are evaluated here."""
        mx.eval([[one.lora_a, one.lora_b, one.magnitude, one.bias] for one in weights.values()])
        return cls(ModulesFormat(dict(weights)), source)

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
        mx.eval([layer.parameters() for layer in layers.values()])
        container = cls(MlxFormat(config, {}), "new adapter")
        container._attach(model, layers, new=True)
        model.freeze()
        for layer in layers.values():
            layer.unfreeze(recurse=False)
        model.train()
        return container

    @property
    def format(self) -> FormatName:
        """Whose files it is like: "mlx" or "peft"."""
        return self._current.name

    @property
    def type(self) -> FineTuneType:
        """LoRA or DoRA."""
        return self._content.type

    @property
    def source(self) -> str:
        """What errors call it."""
        return self._source

    @property
    def base_name(self) -> str | None:
        """The base that the adapter's config names, if it does."""
        return self._content.base_name

    @property
    def ignored_fields(self) -> tuple[str, ...]:
        """Fields of the config that have a value and were ignored, since they matter in training only."""
        return self._content.ignored_fields

    @property
    def dropout(self) -> float:
        """What training drops of the inputs, from 0 to below 1."""
        return self._content.dropout

    @property
    def config(self) -> AdapterConfig:
        """What the adapter_config.json of an adapter in mlx-lm's format says.

        Raises:
            ContainerStateError: the adapter did not come in that format.
        """
        if isinstance(self._content, MlxFormat):
            return self._content.config
        raise ContainerStateError(f"adapter {self._source!r} has no config in mlx-lm's format")

    @property
    def parameters(self) -> dict[str, mx.array]:
        """The tensors as the format names them (mlx-lm: by path in the model), as they are now."""
        return dict(self._current.tensors)

    @property
    def digest(self) -> str:
        """What the adapter computes, as "sha256:…": its tensors and the fields of the config that matter."""
        current = self._current
        if self._tensors_digest is None:
            self._tensors_digest = digest_of(current.tensors)
        meaning = json.dumps([*_as_list(current.meaning), self._tensors_digest])
        return f"sha256:{hashlib.sha256(meaning.encode()).hexdigest()}"

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.parameters.values())

    def check(self, model: nn.Module) -> dict[str, ModuleWeights]:
        """What this adapter brings to each module of `model`, by path. Changes nothing.

        Raises:
            InvalidAdapterError: it does not fit: tensors that are missing, left over or of another shape,
                keys that match nothing, modules that cannot be adapted. Every problem is listed.
            UnsupportedModelError: the model's layers cannot be reached.
            ContainerStateError: another adapter is loaded into the model.
        """
        return self.place(model).weights

    def place(self, model: nn.Module) -> Mapped:
        """As `check`, with the warnings for the load report.

        Raises:
            As `check`.
        """
        _require_no_adapter(model)
        mapped = self._current.on(model)
        if mapped.problems:
            raise InvalidAdapterError(self._source, mapped.problems, mapped.causes)
        return mapped

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
            if isinstance(layer, DoRALayer):
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
        self._content = self._current
        loaded.surgery.undo()
        loaded.before.restore()
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

        What becomes of layers at each precision: `fusion.fuse_layers`. The adapter is not loaded afterwards.

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
            if not is_wrapper(modules[path]):
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
            ContainerStateError: the adapter did not come in mlx-lm's format.
        """
        directory, config = Path(directory), self.config
        directory.mkdir(parents=True, exist_ok=True)
        save_weights(directory / WEIGHTS_FILE, self.parameters)
        config.write(directory / CONFIG_FILE)

    @property
    def _current(self) -> AdapterFormat:
        """The content with the values that the layers hold now: training puts others in place."""
        loaded = self._loaded
        if loaded is not None:
            live = {path: layer.weights for path, layer in loaded.layers.items()}
            if not _same(live, loaded.weights):
                mx.eval([[one.lora_a, one.lora_b, one.magnitude, one.bias] for one in live.values()])
                self._content = self._content.with_weights(live)
                self._tensors_digest = None
                self._loaded = replace(loaded, weights=live)
        return self._content

    def _layers(self, model: nn.Module) -> dict[str, AdaptedLayer]:
        weights = self.check(model)
        config = AdapterConfig(fine_tune_type=self.type, lora_parameters=LoRAParameters(dropout=self.dropout))
        return {path: with_weights(module_at(model, path), one, config) for path, one in weights.items()}

    def _attach(self, model: nn.Module, layers: dict[str, AdaptedLayer], new: bool = False) -> None:
        before = Modes(model)
        weights = {} if new else {path: layer.weights for path, layer in layers.items()}
        self._loaded = _Loaded(model, layers, weights, replace_modules(model, dict(layers)), before)


def require_bare(model: nn.Module) -> None:
    """Refuse a model whose modules are wrapped, by an adapter or by a bank: adapters are never stacked.

    Raises:
        ContainerStateError: naming the first such module.
    """
    _refuse(model, lambda module: is_wrapper(module) or "lora_a" in module)


def _require_no_adapter(model: nn.Module) -> None:
    # The wrappers of a bank are seen through: checking an adapter against a served model is its business.
    _refuse(model, lambda module: is_lora(module) if is_wrapper(module) else "lora_a" in module)


def _refuse(model: nn.Module, carries: Callable[[nn.Module], bool]) -> None:
    carriers = [path for path, module in named_modules(model) if carries(module)]
    if carriers:
        raise ContainerStateError(
            f"expected a model without an adapter, but {len(carriers)} module(s) carry one, first "
            f"{min(carriers)}; unload it first"
        )


def _same(left: Mapping[str, ModuleWeights], right: Mapping[str, ModuleWeights]) -> bool:
    """Whether both hold the very same arrays."""
    return left.keys() == right.keys() and all(
        all(map(operator.is_, left[path].arrays, right[path].arrays)) for path in left
    )


def _as_list(meaning: JsonValue) -> list[JsonValue]:
    return meaning if isinstance(meaning, list) else [meaning]
