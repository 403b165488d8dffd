"""An adapter in PEFT's format, from what it brings to each module.

Factors are transposed, and nothing else: every module keeps its own rank and scale, as rank_pattern and
alpha_pattern have it. Names and meanings are those of PEFT 0.21 (`peft/tuners/lora`). Modules are named as in
the MLX model, which for nearly all models is as transformers names them. What the format cannot say is
refused. Changes nothing; runs on any thread.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import TypeVar

import mlx.core as mx
from pydantic import JsonValue

from ...errors import InvalidAdapterError
from ...layers.module_weights import ModuleWeights
from ..adapter_files import AdapterFiles, in_order
from ..weights import PEFT_WEIGHTS_FILE

__all__ = ["peft_files"]

_PREFIX = "base_model.model."
_T = TypeVar("_T")


def peft_files(
    weights: Mapping[str, ModuleWeights],
    source: str,
    embeddings: Collection[str],
    *,
    base_name: str | None = None,
    dropout: float = 0.0,
) -> AdapterFiles:
    """The files with which PEFT adapts exactly the modules of `weights`; `embeddings` are those that are one.

    Raises:
        InvalidAdapterError: naming `source` and everything that the format cannot say.
    """
    if problems := _problems(weights, embeddings):
        raise InvalidAdapterError(source, problems)
    weights = in_order(weights)
    has_bias = any(module.bias is not None for module in weights.values())
    tensors: dict[str, mx.array] = {}
    for path, module in weights.items():
        name = f"{_PREFIX}{path}"
        if path in embeddings:
            tensors[f"{name}.lora_embedding_A"] = mx.contiguous(module.lora_a.T)
            tensors[f"{name}.lora_embedding_B"] = mx.contiguous(module.lora_b.T)
            continue
        tensors[f"{name}.lora_A.weight"] = mx.contiguous(module.lora_a.T)
        tensors[f"{name}.lora_B.weight"] = mx.contiguous(module.lora_b.T)
        if module.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = module.magnitude
        if has_bias:
            no_bias = mx.zeros(module.lora_b.shape[1:], module.lora_b.dtype)
            tensors[f"{name}.lora_B.bias"] = no_bias if module.bias is None else module.bias
    mx.eval(tensors)
    config: dict[str, JsonValue] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_bias": has_bias,
        "lora_dropout": dropout,
        "target_modules": list(weights),
        "use_dora": any(module.magnitude is not None for module in weights.values()),
        "use_rslora": False,
        # mlx-lm adapts a head that is tied to the embedding with it; elsewhere the field has no effect.
        "ensure_weight_tying": bool(embeddings) and not any(one.lookup_only for one in weights.values()),
        **_ranks_and_alphas(weights),
    }
    return AdapterFiles(config, tensors, PEFT_WEIGHTS_FILE)


def _problems(weights: Mapping[str, ModuleWeights], embeddings: Collection[str]) -> list[str]:
    if not weights:
        return ["expected at least one module, there is none"]
    problems = []
    with_magnitudes = sum(module.magnitude is not None for module in weights.values())
    has_bias = any(module.bias is not None for module in weights.values())
    for path, module in weights.items():
        if module.lora_b.ndim == 3:
            problems.append(
                f"module {path}: factors for each expert; PEFT's format names experts' parameters otherwise, "
                "and writing them is not supported"
            )
        elif path in embeddings and module.magnitude is not None:
            problems.append(
                f"module {path}: DoRA of an embedding has one magnitude for each row here, and one for each "
                "dimension in PEFT"
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


def _ranks_and_alphas(weights: Mapping[str, ModuleWeights]) -> dict[str, JsonValue]:
    """The rank and the alpha of most modules, and patterns for the others."""
    rank = _most_common([module.rank for module in weights.values()])
    alphas = {path: _alpha(module.scale, module.rank) for path, module in weights.items()}
    alpha = _most_common(list(alphas.values()))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {
            _pattern(path): module.rank for path, module in weights.items() if module.rank != rank
        },
        "alpha_pattern": {_pattern(path): value for path, value in alphas.items() if value != alpha},
    }


def _pattern(path: str) -> str:
    """PEFT reads it as a regular expression after any prefix, so it says that there is none."""
    return f"^{re.escape(path)}"


def _alpha(scale: float, rank: int) -> int | float:
    """The alpha whose alpha / rank is `scale`, to the bit where there is one, else the nearest."""
    near = float(scale) * rank
    below, above = (math.nextafter(near, end) for end in (-math.inf, math.inf))
    alpha = min((near, below, above), key=lambda alpha: abs(alpha / rank - scale))
    return int(alpha) if alpha.is_integer() else alpha


def _most_common(values: list[_T]) -> _T:
    return Counter(values).most_common(1)[0][0]
