"""Whatever the weights, densities and scales: a blend is finite, or refused by name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_core.blending.blend import Blend, BlendMethod, BlendOptions, BlendPart, blend
from adapters_core.blending.deltas import drop
from adapters_core.errors import InvalidBlendError
from tests.blending.parts import linear, switch

EXTREMES = [0.0, 5e-324, 1e-300, 1e-38, 1e-9, 0.3, 1.0, 100.0, 1e19, 1e38, 1e300, 1.7e308]
numbers = st.one_of(st.sampled_from([*EXTREMES, *(-one for one in EXTREMES)]), st.floats())
scales = st.sampled_from([1e-6, 2.0, 1e6])


@settings(max_examples=80, deadline=None)
@given(
    method=st.sampled_from(get_args(BlendMethod)),
    weights=st.tuples(numbers, numbers),
    density=st.one_of(st.just(0.5), numbers),
    scale=scales,
)
def test_a_blend_is_finite_or_refused(
    method: BlendMethod, weights: tuple[float, float], density: float, scale: float
) -> None:
    parts = [
        BlendPart("a", weights[0], {"x": replace(linear(1), scale=scale), "y": switch(2)}),
        BlendPart("b", weights[1], {"x": linear(3, rank=7)}),
    ]
    options = BlendOptions(method, None if method in ("linear", "svd") else density)
    found: Blend | None = None
    refused: tuple[str, ...] = ()
    try:
        found = blend(parts, options)
    except InvalidBlendError as error:
        refused = error.problems
    if found is None:
        assert refused
        assert all(problem.partition(":")[0] in ("blend", "density", "x", "y") for problem in refused)
        return
    report = found.report
    assert math.isfinite(report.error_mean)
    assert math.isfinite(report.error_worst)
    for module in found.modules.values():
        assert mx.all(mx.isfinite(module.lora_a)).item()
        assert mx.all(mx.isfinite(module.lora_b)).item()


def test_a_density_of_next_to_nothing_leaves_nothing() -> None:
    delta = np.ones((8, 8), dtype=np.float32)
    assert not drop(delta, 1e-300, np.random.default_rng(0)).any()
