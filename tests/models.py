"""Tiny real mlx-lm models with random weights, and adapters for them, for the tests of every part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama

from adapters_core.config import AdapterConfig
from adapters_core.layers.modules import dense_weight, factor_shapes
from adapters_core.layers.targets import resolve_targets

VOCABULARY = 96
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]


def tiny_llama(
    seed: int = 0,
    quantize_bits: int | None = None,
    *,
    group_size: int = 32,
    mode: str = "affine",
    **overrides: Any,
) -> llama.Model:
    """A Llama of 3 layers, width 64, with biases, float32, in eval mode; quantised on request.

    `overrides` are fields of mlx-lm's llama.ModelArgs.
    """
    fields = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    }
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs(**{**fields, **overrides}))
    if quantize_bits is not None:
        nn.quantize(model, group_size=group_size, bits=quantize_bits, mode=mode)
    mx.eval(model.parameters())
    model.eval()
    return model


def adapter_values(
    kind: str = "lora", *, rank: int = 4, scale: float = 2.0, num_layers: int = -1, keys: Any = QKV
) -> dict[str, Any]:
    """The contents of an adapter_config.json."""
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0}
    if keys is not None:
        parameters["keys"] = keys
    return {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters}


def adapter_tensors(
    model: nn.Module, values: Mapping[str, Any], seed: int = 1, size: float = 0.2
) -> dict[str, mx.array]:
    """Random tensors of an adapter with config `values` for `model`; both factors have entries of `size`."""
    config = AdapterConfig.from_values(dict(values), "test")
    rng = np.random.default_rng(seed)
    rank = config.lora_parameters.rank
    tensors = {}
    for path, module in resolve_targets(model, config).items():
        for leaf, shape in factor_shapes(module, rank, config.fine_tune_type == "dora").items():
            if leaf == "m":
                norm = mx.linalg.norm(dense_weight(module).astype(mx.float32), axis=1)
                tensors[f"{path}.m"] = norm * mx.array(rng.uniform(0.7, 1.4, shape), dtype=mx.float32)
            else:
                tensors[f"{path}.{leaf}"] = mx.array(rng.normal(0, size, shape), dtype=mx.float32)
    return tensors


def write_adapter(
    directory: Path, values: Mapping[str, Any] | None, tensors: Mapping[str, mx.array] | None
) -> Path:
    """A folder with the two files of an adapter; None leaves a file out. Returns the folder."""
    directory.mkdir(parents=True, exist_ok=True)
    if values is not None:
        (directory / "adapter_config.json").write_text(json.dumps(values))
    if tensors is not None:
        mx.save_safetensors(str(directory / "adapters.safetensors"), dict(tensors))
    return directory


def make_adapter(
    directory: Path, model: nn.Module, kind: str = "lora", *, seed: int = 1, size: float = 0.2, **config: Any
) -> Path:
    """A folder with a random adapter for `model`; `config` as for `adapter_values`."""
    values = adapter_values(kind, **config)
    return write_adapter(directory, values, adapter_tensors(model, values, seed, size))


def tokens(*shape: int, seed: int = 7) -> mx.array:
    """Random token ids of `shape`."""
    return mx.array(np.random.default_rng(seed).integers(0, VOCABULARY, shape))


def logits(model: nn.Module, seed: int = 7) -> np.ndarray:
    """Float32 logits (2, 9, vocabulary) of fixed random tokens."""
    return np.array(model(tokens(2, 9, seed=seed)).astype(mx.float32))


def snapshot(model: nn.Module) -> dict[str, bytes]:
    """Everything about a model that has to stay the same: modules, modes, and the bits of its parameters."""
    modules = {
        f"module {path}": f"{id(module)} {module.training} {sorted(module._no_grad)}".encode()
        for path, module in model.named_modules()
    }
    parameters = {
        f"parameter {path}": f"{array.dtype} {array.shape}".encode()
        + np.array(array.reshape(-1).view(mx.uint8)).tobytes()
        for path, array in cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters()))
    }
    return {**modules, **parameters}


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """‖actual - expected‖ / ‖expected‖."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
