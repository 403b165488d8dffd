"""Tiny random models of mlx-lm's architectures, each with something that the others have not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import (
    afm7,
    falcon_h1,
    gemma3_text,
    llama,
    mixtral,
    nemotron_h,
    olmoe,
    phi3,
    qwen3,
    qwen3_moe,
    qwen3_next,
)

from tests.models import VOCABULARY

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
}
_LONG = {"rope_theta": 1e4, "max_position_embeddings": 256, "head_dim": 16}


def _llama() -> nn.Module:
    return llama.Model(llama.ModelArgs(model_type="llama", tie_word_embeddings=False, **_COMMON))


def _qwen3() -> nn.Module:
    return qwen3.Model(qwen3.ModelArgs(model_type="qwen3", tie_word_embeddings=True, **_COMMON, **_LONG))


def _gemma3() -> nn.Module:
    arguments = gemma3_text.ModelArgs(
        model_type="gemma3_text",
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        sliding_window_pattern=2,
        **_COMMON,
    )
    return gemma3_text.Model(arguments)


def _mixtral() -> nn.Module:
    arguments = mixtral.ModelArgs(
        model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=True, **_COMMON
    )
    return mixtral.Model(arguments)


def _qwen3_moe() -> nn.Module:
    arguments = qwen3_moe.ModelArgs(
        model_type="qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        moe_intermediate_size=32,
        tie_word_embeddings=False,
        norm_topk_prob=True,
        **_COMMON,
        **_LONG,
    )
    return qwen3_moe.Model(arguments)


def _olmoe() -> nn.Module:
    arguments = olmoe.ModelArgs(
        model_type="olmoe", num_experts=4, num_experts_per_tok=2, mlp_bias=True, **_COMMON
    )
    return olmoe.Model(arguments)


def _nemotron_h() -> nn.Module:
    common = {name: value for name, value in _COMMON.items() if name != "rms_norm_eps"}
    common["num_hidden_layers"] = 3
    arguments = nemotron_h.ModelArgs(
        model_type="nemotron_h",
        max_position_embeddings=256,
        attention_bias=False,
        head_dim=16,
        mamba_num_heads=4,
        mamba_head_dim=16,
        mamba_proj_bias=False,
        ssm_state_size=16,
        conv_kernel=4,
        n_groups=2,
        mlp_bias=False,
        layer_norm_epsilon=1e-5,
        use_bias=False,
        use_conv_bias=True,
        hybrid_override_pattern=["M", "*", "E"],
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        n_group=1,
        n_routed_experts=4,
        n_shared_experts=1,
        topk_group=1,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        **common,
    )
    return nemotron_h.Model(arguments)


def _falcon_h1() -> nn.Module:
    arguments = falcon_h1.ModelArgs(
        head_dim=16, mamba_d_head=16, mamba_d_ssm=64, mamba_d_state=16, mamba_n_heads=4, **_COMMON
    )
    return falcon_h1.Model(arguments)


def _phi3() -> nn.Module:
    return phi3.Model(phi3.ModelArgs(model_type="phi3", **_COMMON))


def _afm7() -> nn.Module:
    arguments = afm7.ModelArgs(
        model_type="afm7",
        vocab_size=VOCABULARY,
        hidden_dim=64,
        num_layers=4,
        num_kv_reuse_layers=2,
        num_heads=4,
        num_kv_heads=2,
        hidden_dim_scale_factor=1.5,
    )
    model = afm7.Model(arguments)
    for layer in model.model.layers:
        # It rounds keys and values to whole multiples of these.
        layer.self_attn.quant_key_scale = layer.self_attn.quant_value_scale = mx.array(1 / 32)
    return model


def _qwen3_next() -> nn.Module:
    arguments = qwen3_next.ModelArgs(
        model_type="qwen3_next",
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_conv_kernel_dim=4,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        shared_expert_intermediate_size=32,
        mlp_only_layers=[],
        moe_intermediate_size=32,
        partial_rotary_factor=0.5,
        full_attention_interval=2,
        **_COMMON,
        **_LONG,
    )
    return qwen3_next.Model(arguments)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "llama, dense": _llama,
    "qwen3, tied head": _qwen3,
    "gemma3, sliding windows": _gemma3,
    "phi3, fused query, key and value": _phi3,
    "afm7, split query, key and value": _afm7,
    "mixtral, tied head": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "olmoe, flat tokens and biases": _olmoe,
    "falcon_h1, recurrent": _falcon_h1,
    "nemotron_h, recurrent, SwitchMLP": _nemotron_h,
    "qwen3_next, recurrent, experts": _qwen3_next,
}


def tiny(name: str, quantize_bits: int | None = None, mode: str = "affine", seed: int = 0) -> Any:
    """The model of this name, float32, in eval mode; quantised on request, its routers apart."""
    mx.random.seed(seed)
    model = ARCHITECTURES[name]()
    if quantize_bits is not None:
        group_size = {"nvfp4": 16}.get(mode, 32)
        # Some layers have no mode to choose.
        settings = {"group_size": group_size, "bits": quantize_bits}
        settings |= {} if mode == "affine" else {"mode": mode}
        nn.quantize(
            model,
            group_size,
            quantize_bits,
            class_predicate=lambda path, module: (
                hasattr(module, "to_quantized") and not path.endswith("gate") and settings
            ),
        )
    mx.eval(model.parameters())
    model.eval()
    return model
