"""Merges adapted layers into plain ones, and measures what of each adapter's effect survives.

Quantising a merged weight again rounds the adapter's change with it, and can lose a small one. So the
error is always measured, as ‖(W' - W) - Δ‖ / ‖Δ‖ in float32: W the base's weight, Δ the exact change,
W' the weight of the new layer. How a weight may be stored is `forms`' affair; what becomes of the
outputs, `activations`'. Changes no model. Runs on the thread that owns the model, or on any other
that reads the layers while nobody trains them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import mlx.core as mx
import mlx.nn as nn

from ..errors import InvalidAdapterError
from ..layers.adapted import AdaptedLayer
from ..layers.modules import dense_weight
from ..layers.surgery import Surgery
from .forms import Form, beside, merged_forms, size_bytes

__all__ = ["AUTO_THRESHOLD", "FuseReport", "Fusion", "Precision", "fuse_layers"]

Precision = Literal["auto", "requantize", "keep", "dequantize"]
"""How adapted layers are stored: see `fuse_layers`."""

AUTO_THRESHOLD = 0.05
"""The relative error of a layer's change up to which "auto" takes a smaller form."""


@dataclass(frozen=True, slots=True)
class FuseReport:
    """What a fusion did.

    `precision` counts modules by the form that they got (`forms.Form`). The errors are relative errors
    of the fused change, over all modules, none of which is the worst where all errors are 0; `threshold` is
    what "auto" kept to. The bytes are those of the adapted modules alone, as they were in the base and as
    they are now.
    """

    modules: int
    precision: dict[str, int]
    error_mean: float
    error_worst: float
    worst_module: str | None
    threshold: float
    bytes_before: int
    bytes_after: int


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
    form: Form
    error: float


def fuse_layers(
    layers: Mapping[str, AdaptedLayer],
    precision: Precision,
    source: str,
    threshold: float = AUTO_THRESHOLD,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, nn.Module], FuseReport]:
    """Layers that compute what `layers` (by path, not empty) do, evaluated, and how well.

    Dense layers are merged and stay dense, except for "keep". A quantised layer becomes:

    - "requantize": quantised again, as the base is;
    - "dequantize": dense, in the base's compute dtype;
    - "keep": itself, bit for bit, with the factors beside it: exact, and no plain layer;
    - "auto": the smallest plain form whose relative error is at most `threshold`: quantised as the base is,
      else with 8 bits, else dense.

    `progress` is told how many layers of how many are done.

    Raises:
        ValueError: there is no such precision.
        InvalidAdapterError: weights that are not finite once merged, or an embedding that is adapted for
            look-ups alone; all are named, with `source`.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"expected precision to be one of {get_args(Precision)}, got {precision!r}")
    if precision != "keep" and (problems := _problems_of_halves(layers)):
        raise InvalidAdapterError(source, problems)
    fused: dict[str, _Fused] = {}
    for path, layer in layers.items():
        fused[path] = _fuse(layer, precision, threshold)
        progress(len(fused), len(layers))
    broken = [path for path, result in fused.items() if not math.isfinite(result.error)]
    if broken:
        raise InvalidAdapterError(
            source,
            [f"{path}: expected finite weights once fused, got NaN or infinite ones" for path in broken],
        )
    worst = max(fused, key=lambda path: fused[path].error)
    report = FuseReport(
        modules=len(fused),
        precision=dict(Counter(result.form for result in fused.values())),
        error_mean=sum(result.error for result in fused.values()) / len(fused),
        error_worst=fused[worst].error,
        worst_module=worst if fused[worst].error > 0 else None,
        threshold=threshold,
        bytes_before=sum(size_bytes(layer.reverted()) for layer in layers.values()),
        bytes_after=sum(size_bytes(result.module) for result in fused.values()),
    )
    return {path: result.module for path, result in fused.items()}, report


def _problems_of_halves(layers: Mapping[str, AdaptedLayer]) -> list[str]:
    """Why embeddings of which not both uses are adapted, for look-ups and as the head, cannot be merged."""
    why = 'one weight cannot hold both. Only precision "keep" can fuse it'
    halves = {
        path: "the look-up is adapted and the head that is tied to it is not"
        for path, layer in layers.items()
        if layer.lookup_only
    }
    halves |= {
        path: "the head that is tied to it is adapted and the look-up is not, for which the model would need "
        "a head of its own"
        for path, layer in layers.items()
        if layer.head_only
    }
    return [f"{path}: {half}; {why}" for path, half in halves.items()]


def _fuse(layer: AdaptedLayer, precision: Precision, threshold: float) -> _Fused:
    before = dense_weight(layer.reverted()).astype(mx.float32)
    after = layer.fused_weight()
    change = after - before
    size = mx.linalg.norm(change)
    # One module at a time, so that the float32 weights of a whole model never exist at once.
    mx.eval(before, after, change, size)
    bias = layer.fused_bias()
    finite = [mx.isfinite(size), *([] if bias is None else [mx.all(mx.isfinite(bias))])]
    if not mx.all(mx.stack(finite)).item():
        return _Fused(beside(layer), "unmerged", math.nan)
    if precision == "keep":
        return _Fused(beside(layer), "unmerged", 0.0)
    found: list[_Fused] = []
    is_changed = size.item() != 0.0
    for form, module in merged_forms(
        layer, after, dequantize=precision == "dequantize", is_changed=is_changed
    ):
        found.append(_Fused(module, form, _error(module, before, change, size)))
        if precision != "auto" or found[-1].error <= threshold:
            return found[-1]
    return min(found, key=lambda result: result.error)


def _error(module: nn.Module, before: mx.array, change: mx.array, size: mx.array) -> float:
    """‖(W' - W) - Δ‖ / ‖Δ‖, which is 0 where there is neither a change nor a loss. Evaluates `module`."""
    lost = mx.linalg.norm((dense_weight(module).astype(mx.float32) - before) - change)
    bias = module.get("bias")
    if bias is not None:
        lost = mx.where(mx.all(mx.isfinite(bias)), lost, mx.nan)
    mx.eval(module.parameters(), lost)
    if size.item() == 0.0 and lost.item() == 0.0:
        return 0.0
    return cast(float, mx.divide(lost, size).item())
