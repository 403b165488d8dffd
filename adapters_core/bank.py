"""The adapters that are resident beside one model: prepared, added, removed.

`prepare` reads the model and may run on any thread, so that a load does not hold up a forward; `add`
and `remove` change the model and run on the thread that owns it, between two forwards. The bank knows
no names, versions or requests: whoever removes a resident makes sure that no row uses it any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .container import AdapterContainer, LinearWeights
from .errors import ContainerStateError
from .layers import compute_dtype, dense_weight
from .mixed import LayerFactors, MixedLinear, padded_rank
from .routing import ResidentAdapter, Routing, RowAdapters, make_row, row_key
from .surgery import replace_modules
from .targets import module_at

__all__ = ["AdapterBank", "PreparedAdapter", "ResidentAdapter", "RowAdapters", "make_row", "row_key"]


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """An adapter that was checked against a model and laid out for its bank, evaluated."""

    resident: ResidentAdapter
    factors: dict[str, LayerFactors]


class AdapterBank:
    """The resident adapters of `model`.

    Layers are wrapped when the first adapter that adapts them comes and unwrapped when the last goes, so
    that an empty bank leaves the very modules that were there before it.
    """

    def __init__(self, model: nn.Module, routing: Routing) -> None:
        self._model = model
        self._routing = routing
        self._layers: dict[str, MixedLinear] = {}
        self._residents: set[ResidentAdapter] = set()

    @property
    def residents(self) -> frozenset[ResidentAdapter]:
        """The adapters that rows may use."""
        return frozenset(self._residents)

    @property
    def resident_bytes(self) -> int:
        """What the bank really takes, free slots included."""
        return sum(array.nbytes for layer in self._layers.values() for array in layer.stacked_arrays())

    def prepare(self, container: AdapterContainer) -> PreparedAdapter:
        """Check `container` against the model and lay its weights out; changes nothing.

        Raises:
            InvalidAdapterError: it does not fit the model; every problem is listed.
        """
        weights = container.check(self._model)
        default = _float_dtype(self._model)
        factors = {
            path: _lay_out(module_at(self._model, path), linear, default) for path, linear in weights.items()
        }
        arrays = [array for factor in factors.values() for array in factor.arrays()]
        mx.eval(arrays)
        resident = ResidentAdapter(
            digest=container.digest,
            type=container.config.fine_tune_type.value,
            rank=max(linear.lora_a.shape[1] for linear in weights.values()),
            scale=max((linear.scale for linear in weights.values()), key=abs),
            paths=tuple(sorted(factors)),
            size_bytes=sum(array.nbytes for array in arrays),
        )
        return PreparedAdapter(resident, factors)

    def add(self, adapter: PreparedAdapter | AdapterContainer) -> ResidentAdapter:
        """Make `adapter` available to rows; a container is prepared first.

        Raises:
            InvalidAdapterError: it does not fit the model.
            ContainerStateError: it is resident already.
        """
        prepared = self.prepare(adapter) if isinstance(adapter, AdapterContainer) else adapter
        resident = prepared.resident
        if resident in self._residents:
            raise ContainerStateError(f"adapter {resident.digest} is resident already")
        new = {
            path: MixedLinear(path, module_at(self._model, path), self._routing)
            for path in prepared.factors
            if path not in self._layers
        }
        replace_modules(self._model, new)
        self._layers.update(new)
        for path, factors in prepared.factors.items():
            self._layers[path].put(resident, factors)
        self._residents.add(resident)
        self._changed(resident)
        return resident

    def remove(self, resident: ResidentAdapter) -> int:
        """Drop `resident` and return the bytes that this freed.

        Raises:
            ContainerStateError: it is not resident.
        """
        if resident not in self._residents:
            raise ContainerStateError(f"adapter {resident.digest} is not resident")
        before = self.resident_bytes
        self._residents.remove(resident)
        for path in resident.paths:
            self._layers[path].drop(resident)
        self._changed(resident)
        empty = [path for path in resident.paths if self._layers[path].is_empty]
        replace_modules(self._model, {path: self._layers.pop(path).reverted() for path in empty})
        return before - self.resident_bytes

    def close(self) -> None:
        """Remove every adapter; the model is as it was before the first."""
        for resident in self.residents:
            self.remove(resident)

    def _changed(self, resident: ResidentAdapter) -> None:
        self._routing.generation += 1
        mx.eval([self._layers[path].stacked_arrays() for path in resident.paths])


def _lay_out(linear: nn.Module, weights: LinearWeights, default: mx.Dtype) -> LayerFactors:
    """A as (R, in), B as (R, out), padded to R, in a dtype that holds the file's and the layer's."""
    compute = compute_dtype(linear, default)
    dtype = (mx.zeros(1, compute) + mx.zeros(1, weights.lora_a.dtype)).dtype
    missing = padded_rank(weights.lora_a.shape[1]) - weights.lora_a.shape[1]
    a = mx.pad(weights.lora_a.T, [(0, missing), (0, 0)]).astype(dtype)
    b = mx.pad(weights.lora_b, [(0, missing), (0, 0)]).astype(dtype)
    factor = None
    if weights.magnitude is not None:
        base = dense_weight(linear).astype(mx.float32)
        delta = (weights.scale * weights.lora_b.T.astype(mx.float32)) @ weights.lora_a.T.astype(mx.float32)
        norm = mx.linalg.norm(base + delta, axis=1)
        factor = (weights.magnitude.astype(mx.float32) / norm).astype(compute)
    return LayerFactors(mx.contiguous(a), mx.contiguous(b), weights.scale, factor)


def _float_dtype(model: nn.Module) -> mx.Dtype:
    for _, array in cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters())):
        if mx.issubdtype(array.dtype, mx.floating):
            return array.dtype
    return mx.float32
