"""Variables of the environment that MLX's CUDA back end reads once, at its first use of them.

Imports no MLX, and is called before anything does. What the user has set stays.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from importlib import metadata
from pathlib import Path

__all__ = ["set_mlx_variables"]

_GPUS = Path("/proc/driver/nvidia/gpus")
_DEFAULTS = {
    # cuDNN plans attention anew for each length of prompt and KV cache, which takes longer than to read a
    # prompt; without it, attention to a prompt is two products and a softmax.
    "MLX_CUDA_USE_CUDNN_SDPA": "0",
    # To build a CUDA graph of a step, and to change the one of the step before into it, takes the host longer
    # than to launch its kernels, most of all where the batch has changed. And clusters of blocks, which our
    # kernels use, fail in graphs that are changed.
    "MLX_USE_CUDA_GRAPHS": "0",
    # MLX takes it for an error of the program if shapes differ more often than its plans and graphs are kept.
    # Those of a server always do in the end, and the error would fail all running requests.
    "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",
}


def set_mlx_variables(cache_dir: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set in `environment` what fits a server and is not set there; other back ends ignore it.

    Kernels that MLX compiles are kept under `cache_dir` for the next start, by its version and the GPU, in
    files that MLX names by their texts.
    """
    folder = cache_dir / "kernels" / f"mlx-{_mlx_version()}" / _gpu_name()
    environment.setdefault("MLX_PTX_CACHE_DIR", str(folder))
    for name, value in _DEFAULTS.items():
        environment.setdefault(name, value)


def _gpu_name() -> str:
    """The model of the NVIDIA GPUs, fit for a folder; "gpu" where the driver does not tell."""
    try:
        texts = [path.read_text() for path in sorted(_GPUS.glob("*/information"))]
    except OSError:
        texts = []
    models = {
        line.partition(":")[2].strip() for text in texts for line in text.splitlines() if "Model:" in line
    }
    return re.sub(r"[^A-Za-z0-9]+", "-", " ".join(sorted(models))).strip("-") or "gpu"


def _mlx_version() -> str:
    try:
        return metadata.version("mlx")
    except metadata.PackageNotFoundError:
        return "unknown"
