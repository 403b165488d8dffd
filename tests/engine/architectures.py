"""Tiny random models whose caches cannot be trimmed: recurrent, hybrid, both in one layer."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import falcon_h1, lfm2, mamba

from tests.models import VOCABULARY


def _ready(model: nn.Module) -> nn.Module:
    mx.eval(model.parameters())
    model.eval()
    return model


def tiny_mamba() -> nn.Module:
    """Recurrent state alone, and no notion of padding."""
    mx.random.seed(4)
    args = mamba.ModelArgs(
        model_type="mamba",
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        state_size=8,
        num_hidden_layers=2,
        conv_kernel=4,
        use_bias=False,
        use_conv_bias=True,
        time_step_rank=4,
    )
    return _ready(mamba.Model(args))


def tiny_lfm2() -> nn.Module:
    """Short convolutions in two layers, attention in one."""
    mx.random.seed(5)
    args = lfm2.ModelArgs(
        model_type="lfm2",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        norm_eps=1e-5,
        conv_bias=False,
        conv_L_cache=3,
        block_dim=32,
        block_multiple_of=8,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
        block_ff_dim=64,
        full_attn_idxs=[1],
    )
    return _ready(lfm2.Model(args))


def tiny_falcon() -> nn.Module:
    """Recurrent state and attention side by side in each layer, in a list of caches."""
    mx.random.seed(6)
    args = falcon_h1.ModelArgs(
        head_dim=8,
        hidden_size=32,
        intermediate_size=64,
        mamba_d_head=8,
        mamba_d_ssm=32,
        mamba_d_state=8,
        mamba_n_heads=4,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        lm_head_multiplier=1.0,
        embedding_multiplier=5.0,
    )
    return _ready(falcon_h1.Model(args))
