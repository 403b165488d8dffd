"""An adapter in mlx-lm's format, from what it brings to each module.

The format has one kind, one rank and one scale for all modules. Smaller ranks are padded with zeros, which
changes no product. Other scales go into B: exactly where the ratio of the scales is a power of two, else in
float32, where the rounding of one product remains (about 1e-7 of each entry). The format has factors for each
output of a split layer; those of a product for all of them are taken apart. What the format cannot say is
refused. Changes nothing; runs on any thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from pydantic import JsonValue

from ..config import MAX_RANK, AdapterConfig
from ..errors import InvalidAdapterError
from ..layers.module_weights import ModuleWeights
from ..layers.modules import ModuleKind, kind_of, output_sizes
from ..layers.targets import adaptable_layers, find_targets, module_at
from .adapter_files import AdapterFiles, in_order, scaled
from .tensor_names import tensors_of
from .weights import WEIGHTS_FILE

__all__ = ["mlx_files"]


def mlx_files(
    weights: Mapping[str, ModuleWeights],
    source: str,
    model: nn.Module | None = None,
    *,
    base_name: str | None = None,
    dropout: float = 0.0,
) -> AdapterFiles:
    """The files with which mlx-lm adapts exactly the modules of `weights`, which are full paths in the model.

    With the `model`, the config names modules relative to their layers where that says the same; other
    tools than mlx-lm may need it so.

    Raises:
        InvalidAdapterError: naming `source` and everything that the format cannot say.
        UnsupportedModelError: the model's layers cannot be reached.
    """
    if problems := _problems(weights):
        raise InvalidAdapterError(source, problems)
    weights = in_order(weights)
    if model is not None:
        weights = {path: _divided(one, module_at(model, path)) for path, one in weights.items()}
    if problems := _too_large(weights):
        raise InvalidAdapterError(source, problems)
    rank = max(module.file_rank for module in weights.values())
    scale = _common_scale(module.scale for module in weights.values())
    is_dora = any(module.magnitude is not None for module in weights.values())
    tensors = tensors_of({path: _fitted(module, rank, scale) for path, module in weights.items()})
    mx.eval(tensors)
    kind = "dora" if is_dora else "lora"
    parameters: dict[str, JsonValue] = {"rank": rank, "scale": scale, "dropout": dropout}
    num_layers, keys = (-1, list(weights)) if model is None else _choice(weights, model, kind)
    config: dict[str, JsonValue] = {
        "fine_tune_type": kind,
        "num_layers": num_layers,
        "lora_parameters": {**parameters, "keys": list[JsonValue](keys)},
    }
    if base_name is not None:
        config["model"] = base_name
    return AdapterFiles(AdapterConfig.from_values(config, source).to_values(), tensors, WEIGHTS_FILE)


def _problems(weights: Mapping[str, ModuleWeights]) -> list[str]:
    if not weights:
        return ["expected at least one module, there is none"]
    problems = [
        f"module {path}: it has a bias of its own (lora_bias), which mlx-lm's format cannot say"
        for path, module in weights.items()
        if module.bias is not None
    ]
    problems += [
        f"module {path}: its look-up is adapted and the head that is tied to it is not, which mlx-lm's "
        "format cannot say"
        for path, module in weights.items()
        if module.lookup_only
    ]
    problems += [
        f"module {path}: the head that is tied to it is adapted and its look-up is not, which mlx-lm's "
        "format cannot say. Write it in PEFT's format"
        for path, module in weights.items()
        if module.head_only
    ]
    problems += [
        f"module {path}: its DoRA has a magnitude for each feature of the embedding, as PEFT's has; mlx-lm's "
        "has one for each token. Write it in PEFT's format"
        for path, module in weights.items()
        if module.by_feature
    ]
    bare = [path for path, module in weights.items() if module.magnitude is None]
    if len(bare) < len(weights):
        problems += [
            f"module {path}: it has no magnitudes and others have; mlx-lm's format has one kind for all"
            for path in bare
        ]
    return problems


def _too_large(weights: Mapping[str, ModuleWeights]) -> list[str]:
    return [
        f"module {path}: expected a rank of at most {MAX_RANK}, got {module.file_rank}"
        for path, module in weights.items()
        if module.file_rank > MAX_RANK
    ]


def _divided(weights: ModuleWeights, module: nn.Module) -> ModuleWeights:
    """With factors for each output, if `module` is a split layer; what is nought in them is left out."""
    if kind_of(module) is not ModuleKind.SPLIT or weights.parts:
        return weights
    parts = [_without_zeros(a, b) for a, b in weights.divided(output_sizes(module))]
    return ModuleWeights.of_parts(parts, weights.scale, weights.bias)


def _without_zeros(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """A and B, of a product of which they may hold more than this output needs."""
    heard = cast("list[bool]", mx.any(b, axis=1).tolist())
    kept = mx.array([at for at, is_heard in enumerate(heard) if is_heard] or [0])
    return a[:, kept], b[kept]


def _fitted(module: ModuleWeights, rank: int, scale: float) -> ModuleWeights:
    """The same change, times `scale` and with factors of this rank."""
    alone = [ModuleWeights(a, b, None, module.scale) for a, b in module.pairs]
    pairs = [_padded(*scaled(one, scale), rank) for one in alone]
    if module.parts:
        return ModuleWeights.of_parts(pairs, scale)
    return ModuleWeights(*pairs[0], module.magnitude, scale)


def _common_scale(scales: Iterable[float]) -> float:
    """That of most modules, so that fewest factors change, and of equals the largest; 0 only among zeros."""
    counts = Counter(scale for scale in scales if scale)
    return max(counts, key=lambda scale: (counts[scale], abs(scale)), default=0.0)


def _padded(a: mx.array, b: mx.array, rank: int) -> tuple[mx.array, mx.array]:
    is_switch = b.ndim == 3
    return _pad(a, rank, axis=1), _pad(b, rank, axis=2 if is_switch else 0)


def _pad(array: mx.array, size: int, axis: int) -> mx.array:
    missing = size - array.shape[axis]
    widths = [(0, missing if at == axis else 0) for at in range(array.ndim)]
    return mx.pad(array, widths) if missing else array


def _choice(paths: Iterable[str], model: nn.Module, kind: str) -> tuple[int, list[str]]:
    """num_layers and keys that choose exactly `paths`: relative to layers if they can be, else in full."""
    wanted = list(paths)
    layers = [path for path, _ in adaptable_layers(model)]
    owners = {path: _owner(path, layers) for path in wanted}
    inside = [index for index in owners.values() if index is not None]
    if inside:
        keys = dict.fromkeys(
            path if index is None else path.removeprefix(f"{layers[index]}.")
            for path, index in owners.items()
        )
        num_layers = len(layers) - min(inside) if min(inside) else -1
        parameters = {"keys": list(keys)}
        config = AdapterConfig.from_values(
            {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters}, "choice"
        )
        targets, problems = find_targets(model, config)
        if not problems and targets.keys() == set(wanted):
            return num_layers, list(keys)
    return -1, wanted


def _owner(path: str, layers: list[str]) -> int | None:
    return next((at for at, layer in enumerate(layers) if path.startswith(f"{layer}.")), None)
