"""What the CUDA kernels have in common: the names of types, names for texts, and functions made of texts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import mlx.core as mx

__all__ = ["TYPES", "Function", "Text", "has_clusters", "make_function", "named"]

TYPES = {mx.bfloat16: "__nv_bfloat16", mx.float16: "__half", mx.float32: "float"}

_CLUSTERS_SINCE = 9  # major compute capability

Function = Callable[..., Sequence[mx.array]]


class Text(NamedTuple):
    """The source of one kernel: what comes before the function that MLX writes, and what lies in it."""

    name: str
    header: str
    body: str


def has_clusters() -> bool:
    """Whether kernels may run in clusters of blocks: the GPU can, and MLX launches kernels one by one.

    MLX changes CUDA graphs into others of the same form and does not see clusters that a kernel's text asks
    for: such a graph fails on the GPU, unseen, and all that is computed afterwards is wrong.
    """
    capability = mx.device_info(mx.default_device()).get("compute_capability_major", 0)
    return int(capability) >= _CLUSTERS_SINCE and os.environ.get("MLX_USE_CUDA_GRAPHS") == "0"


def named(part: str, header: str, body: str) -> Text:
    """MLX keeps what it has compiled by name, so the name holds a digest of the text."""
    digest = hashlib.sha256((header + body).encode()).hexdigest()[:16]
    return Text(f"graft_{part}_{digest}", header, body)


def make_function(text: Text, inputs: Sequence[str], outputs: Sequence[str]) -> Function:
    """The kernel as a function of (inputs, grid, threadgroup, output_shapes, output_dtypes), by name."""
    kernel = mx.fast.cuda_kernel(
        name=text.name,
        input_names=list(inputs),
        output_names=list(outputs),
        header=text.header,
        source=text.body,
    )
    return cast(Function, kernel)
