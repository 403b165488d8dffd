"""Variables of the environment that MLX's CUDA back end reads once, at its first use of them.

Imports no MLX, and is called before anything does. What the user has set stays.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

__all__ = ["set_mlx_variables"]

_DEFAULTS = {
    # cuDNN plans attention anew for each length of prompt and KV cache, which takes longer than to read a
    # prompt; without it, attention to a prompt is two products and a softmax.
    "MLX_CUDA_USE_CUDNN_SDPA": "0",
    # MLX takes it for an error of the program if shapes differ more often than its plans and graphs are kept.
    # Those of a server always do in the end, and the error would fail all running requests.
    "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
}


def set_mlx_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set in `environment` what fits a server and is not set there; other back ends ignore it."""
    for name, value in _DEFAULTS.items():
        environment.setdefault(name, value)
