"""An adapter in PEFT's format, from what it brings to each module.

Factors are transposed, and nothing else: every module keeps its own rank and scale, as rank_pattern and
alpha_pattern have it; experts become parameters (`expert_writing`). Names and meanings are those of PEFT 0.21
(`peft/tuners/lora`). Modules are named as in the MLX model, which for nearly all models is as transformers
names them. What the format cannot say is refused. Changes nothing; runs on any thread.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

import mlx.core as mx
from pydantic import JsonValue

from ...config import MAX_RANK
from ...errors import InvalidAdapterError
from ...layers.module_weights import ModuleWeights
from ..adapter_files import AdapterFiles, in_order
from ..weights import PEFT_WEIGHTS_FILE
from .config import MAX_ALPHA
from .expert_writing import expert_parameters, router_parameter
from .names import HEADS, is_head, is_input_embedding
from .patterns import MAX_KEYS
from .tied_heads import heads_apart
from .ties import TIED_NAMES

__all__ = ["peft_files"]

_PREFIX = "base_model.model."
# Whose layout of experts' parameters is followed; readers cannot tell it from anything else.
_PEFT_VERSION = "0.21.2"
_T = TypeVar("_T")


def peft_files(
    weights: Mapping[str, ModuleWeights],
    source: str,
    embeddings: Collection[str],
    *,
    tied: str | None = None,
    model_type: str | None = None,
    base_name: str | None = None,
    dropout: float = 0.0,
) -> AdapterFiles:
    """The files with which PEFT adapts exactly the modules of `weights`; `embeddings` are those that are one.

    `tied` is the one that is the model's head as well; without a `model_type`, any may be. Experts are
    written for a known `model_type` alone, and without `dropout`, which PEFT has not for them.

    Raises:
        InvalidAdapterError: naming `source` and everything that the format cannot say.
    """
    weights, embeddings = heads_apart(in_order(weights), embeddings)
    experts = {path: module for path, module in weights.items() if module.lora_b.ndim == 3}
    modules = {path: module for path, module in weights.items() if path not in experts}
    parameters, problems = expert_parameters(experts, model_type)
    if problems := _problems(weights, embeddings) + problems:
        raise InvalidAdapterError(source, problems)
    has_bias = any(module.bias is not None for module in weights.values())
    found = {path: router_parameter(path, module, model_type) for path, module in modules.items()}
    routers = {path: router for path, router in found.items() if router is not None and not has_bias}
    parameters += routers.values()
    modules = {path: module for path, module in modules.items() if path not in routers}
    named = modules | {parameter.name: parameter.weights for parameter in parameters}
    if problems := _too_large(named):
        raise InvalidAdapterError(source, problems)
    tensors: dict[str, mx.array] = {}
    for path, module in modules.items():
        own = _embedding(module) if path in embeddings else _linear(module, has_bias)
        tensors |= {f"{_PREFIX}{path}.{leaf}": tensor for leaf, tensor in own.items()}
    for parameter in parameters:
        tensors |= {f"{_PREFIX}{name}": tensor for name, tensor in parameter.tensors.items()}
    mx.eval(tensors)
    # mlx-lm adapts a head that is tied to the embedding with it; elsewhere the field has no effect.
    ties = _ties(modules, embeddings if model_type is None else [path for path in embeddings if path == tied])
    config: dict[str, JsonValue] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_bias": has_bias,
        "lora_dropout": 0.0 if parameters else dropout,
        "target_modules": [*modules, *(_named_for_ties(modules) if tied and ties else ())],
        "use_dora": any(module.magnitude is not None for module in weights.values()),
        "use_rslora": False,
        "ensure_weight_tying": ties,
        **_ranks_and_alphas(named, _tied_head(modules, embeddings) if ties else {}),
    }
    if parameters:
        config["target_parameters"] = [parameter.name for parameter in parameters]
        config["peft_version"] = _PEFT_VERSION
    return AdapterFiles(config, tensors, PEFT_WEIGHTS_FILE)


def _ties(weights: Mapping[str, ModuleWeights], embeddings: Collection[str]) -> bool:
    """Whether a head that is tied to one of the `embeddings` has its factors."""
    found = [weights[path] for path in embeddings]
    return bool(found) and not any(one.lookup_only or one.by_feature for one in found)


def _named_for_ties(modules: Collection[str]) -> tuple[str, ...]:
    """The name by which PEFT sees that a head is to follow its embedding, unless the embedding has one."""
    return () if any(path.rpartition(".")[2] in TIED_NAMES for path in modules) else (TIED_NAMES[-1],)


def _embedding(module: ModuleWeights) -> dict[str, mx.array]:
    tensors = {
        "lora_embedding_A": mx.contiguous(module.lora_a.T),
        "lora_embedding_B": mx.contiguous(module.lora_b.T),
    }
    return tensors if module.magnitude is None else tensors | {"lora_magnitude_vector": module.magnitude}


def _linear(module: ModuleWeights, has_bias: bool) -> dict[str, mx.array]:
    """With `has_bias`, a module that has none gets one of zeros: PEFT has it in all or in none."""
    tensors = {
        "lora_A.weight": mx.contiguous(module.lora_a.T),
        "lora_B.weight": mx.contiguous(module.lora_b.T),
    }
    if module.magnitude is not None:
        tensors["lora_magnitude_vector"] = module.magnitude
    if has_bias:
        no_bias = mx.zeros(module.lora_b.shape[1:], module.lora_b.dtype)
        tensors["lora_B.bias"] = no_bias if module.bias is None else module.bias
    return tensors


def _problems(weights: Mapping[str, ModuleWeights], embeddings: Collection[str]) -> list[str]:
    if not weights:
        return ["expected at least one module, there is none"]
    problems = []
    with_magnitudes = sum(module.magnitude is not None for module in weights.values())
    has_bias = any(module.bias is not None for module in weights.values())
    for path, module in weights.items():
        if module.lora_b.ndim == 3 and (with_magnitudes or has_bias):
            field = "use_dora" if with_magnitudes else "lora_bias"
            problems.append(f"module {path}: factors for each expert, which PEFT has not beside {field}")
        elif path in embeddings and module.magnitude is not None and not module.by_feature:
            problems.append(
                f"module {path}: its DoRA has a magnitude for each token of the embedding, as mlx-lm has it; "
                "PEFT's has one for each feature. Write it in mlx-lm's format"
            )
        elif module.magnitude is None and with_magnitudes:
            problems.append(
                f"module {path}: it has no magnitudes and others have; PEFT's format has one kind for all"
            )
        elif path in embeddings and has_bias:
            problems.append(f"module {path}: PEFT has no bias (lora_bias) for embeddings")
        elif module.magnitude is not None and module.bias is not None:
            problems.append(f"module {path}: PEFT has no bias (lora_bias) for DoRA")
    return problems


def _too_large(named: Mapping[str, ModuleWeights]) -> list[str]:
    """Ranks and alphas that are refused when they are read."""
    problems = [
        f"module {name}: expected a rank of at most {MAX_RANK}, got {module.rank}"
        for name, module in named.items()
        if module.rank > MAX_RANK
    ]
    problems += [
        f"module {name}: expected a lora_alpha between -{MAX_ALPHA:g} and {MAX_ALPHA:g}, got "
        f"{_alpha(module):g} (scale {module.scale:g} times rank {module.rank})"
        for name, module in named.items()
        if not abs(_alpha(module)) <= MAX_ALPHA
    ]
    ranks: list[float] = [module.rank for module in named.values()]
    for what, values in (("ranks", ranks), ("alphas", _alphas(named))):
        if (count := len(values) - values.count(_most_common(values))) > MAX_KEYS:
            problems.append(f"expected at most {MAX_KEYS} modules with {what} other than most, got {count}")
    return problems


def _tied_head(modules: Mapping[str, ModuleWeights], embeddings: Collection[str]) -> dict[str, ModuleWeights]:
    """The head, by the end of its name, where it can only be a tied one, with what its embedding has."""
    tied = [modules[path] for path in embeddings if path in modules and is_input_embedding(path)]
    return {HEADS[0]: tied[0]} if tied and not any(is_head(path) for path in modules) else {}


def _ranks_and_alphas(
    weights: Mapping[str, ModuleWeights], by_end: Mapping[str, ModuleWeights]
) -> dict[str, JsonValue]:
    """The rank and the alpha of most modules, and patterns for the others and for those named `by_end`."""
    rank = _most_common([module.rank for module in weights.values()])
    alpha = _most_common(_alphas(weights))
    patterns = {_pattern(path): module for path, module in weights.items()} | dict(by_end)
    ranks = {key: module.rank for key, module in patterns.items() if module.rank != rank}
    alphas = {key: value for key, module in patterns.items() if (value := _alpha(module)) != alpha}
    return {"r": rank, "lora_alpha": alpha, "rank_pattern": dict(ranks), "alpha_pattern": dict(alphas)}


def _pattern(path: str) -> str:
    """PEFT reads it as a regular expression after any prefix, so it says that there is none."""
    return f"^{re.escape(path)}"


def _alpha(module: ModuleWeights) -> int | float:
    """The alpha whose alpha / rank is the scale, to the bit where there is one, else the nearest."""
    scale, rank = float(module.scale), module.rank
    near = scale * rank
    below, above = (math.nextafter(near, end) for end in (-math.inf, math.inf))
    alpha = min((near, below, above), key=lambda alpha: abs(alpha / rank - scale))
    return int(alpha) if alpha.is_integer() else alpha


def _alphas(weights: Mapping[str, ModuleWeights]) -> list[float]:
    return [_alpha(module) for module in weights.values()]


def _most_common(values: Sequence[_T]) -> _T:
    return Counter(values).most_common(1)[0][0]
