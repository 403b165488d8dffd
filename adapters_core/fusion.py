"""Merges adapted layers into plain ones, and measures what of each adapter's effect survives.

Quantising a merged weight again rounds the adapter's change with it, and can lose a small one. So the
error is always measured, as ‖(W' - W) - Δ‖ / ‖Δ‖ in float32: W the base's weight, Δ the exact change,
W' the weight of the new layer. Changes no model. Runs on the thread that owns the model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import mlx.core as mx
import mlx.nn as nn

from .errors import InvalidAdapterError
from .layers import DoRALinear, LoRALinear, dense_linear, dense_weight, quantized_like
from .surgery import Surgery

__all__ = ["AUTO_THRESHOLD", "FuseReport", "Fusion", "Precision", "fuse_layers"]

Precision = Literal["auto", "requantize", "dequantize"]
"""How quantised layers are fused: kept quantised, made dense, or (auto) quantised where that loses little."""

AUTO_THRESHOLD = 0.05
_Outcome = Literal["dense", "requantized", "kept_dense"]


@dataclass(frozen=True, slots=True)
class FuseReport:
    """What a fusion did.

    `precision` counts modules by outcome: "dense" (the base is dense, or "dequantize" was asked for),
    "requantized", and "kept_dense" ("auto" found that quantising again loses too much). The errors are
    relative errors of the fused change, over all modules.
    """

    modules: int
    precision: dict[str, int]
    error_mean: float
    error_worst: float
    worst_module: str


class Fusion:
    """An adapter that was fused into a model, and the way back."""

    def __init__(self, report: FuseReport, surgery: Surgery, restore: Callable[[], None]) -> None:
        self.report = report
        self._surgery = surgery
        self._restore = restore

    def undo(self) -> None:
        """Leave the model bit for bit as it was before, with the adapter loaded if it was.

        Raises:
            ContainerStateError: it was undone already, or later changes of the model come first.
        """
        self._surgery.undo()
        self._restore()


class _Fused(NamedTuple):
    module: nn.Module
    outcome: _Outcome
    error: float


def fuse_layers(
    layers: Mapping[str, LoRALinear | DoRALinear], precision: Precision, source: str
) -> tuple[dict[str, nn.Module], FuseReport]:
    """Plain layers that compute what `layers` (by path, not empty) do, evaluated, and how well.

    Raises:
        ValueError: there is no such precision.
        InvalidAdapterError: weights that are not finite once merged; all are named, with `source`.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"expected precision to be one of {get_args(Precision)}, got {precision!r}")
    fused = {path: _fuse(layer, precision) for path, layer in layers.items()}
    broken = [path for path, result in fused.items() if not math.isfinite(result.error)]
    if broken:
        raise InvalidAdapterError(
            source,
            [f"{path}: expected finite weights once fused, got NaN or infinite ones" for path in broken],
        )
    worst = max(fused, key=lambda path: fused[path].error)
    report = FuseReport(
        modules=len(fused),
        precision=dict(Counter(result.outcome for result in fused.values())),
        error_mean=sum(result.error for result in fused.values()) / len(fused),
        error_worst=fused[worst].error,
        worst_module=worst,
    )
    return {path: result.module for path, result in fused.items()}, report


def _fuse(layer: LoRALinear | DoRALinear, precision: Precision) -> _Fused:
    base = layer.reverted()
    before = dense_weight(base).astype(mx.float32)
    after = layer.fused_weight()
    change = after - before
    size = mx.linalg.norm(change)
    # One module at a time, so that the float32 weights of a whole model never exist at once.
    mx.eval(before, after, change, size)
    if not isinstance(base, nn.QuantizedLinear) or precision == "dequantize":
        return _measured(dense_linear(base, after), "dense", before, change, size)
    if size.item() == 0.0:
        # Even an unchanged weight need not survive being quantised again.
        return _Fused(base, "requantized", 0.0)
    result = _measured(quantized_like(base, after), "requantized", before, change, size)
    if precision == "auto" and not result.error <= AUTO_THRESHOLD:
        return _measured(dense_linear(base, after), "kept_dense", before, change, size)
    return result


def _measured(
    module: nn.Module, outcome: _Outcome, before: mx.array, change: mx.array, size: mx.array
) -> _Fused:
    lost = mx.linalg.norm((dense_weight(module).astype(mx.float32) - before) - change)
    mx.eval(module.parameters(), lost)
    if size.item() == 0.0 and lost.item() == 0.0:
        return _Fused(module, outcome, 0.0)
    return _Fused(module, outcome, cast(float, mx.divide(lost, size).item()))
