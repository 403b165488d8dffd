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

from .container import AdapterContainer
from .errors import ContainerStateError, InvalidAdapterError
from .layout import Factors, GroupLayout, Layout, Projection, bucket_rank, group_projections
from .mixed import MixedLinear, ProjectionGroup
from .module_weights import ModuleWeights
from .modules import ModuleKind, compute_dtype, dense_weight, kind_of, weight_shape
from .routing import Placement, ResidentAdapter, Routing, RowAdapters, make_row, row_key
from .stacks import Shelf
from .surgery import replace_modules
from .targets import module_at

__all__ = ["AdapterBank", "PreparedAdapter", "ResidentAdapter", "RowAdapters", "make_row", "row_key"]


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """An adapter that was checked against a model and laid out for its bank; its rows are evaluated.

    `scale` is what its deltas still have to be multiplied with: 1 where B has taken the scale in.
    """

    resident: ResidentAdapter
    scale: float
    groups: dict[str, GroupLayout]
    rows: dict[str, mx.array]


class AdapterBank:
    """The resident adapters of `model`.

    Layers are wrapped when the first adapter that adapts them comes and unwrapped when the last goes, so
    that an empty bank leaves the very modules that were there before it.
    """

    def __init__(self, model: nn.Module, routing: Routing) -> None:
        self._model = model
        self._routing = routing
        self._float_dtype = _float_dtype(model)
        self._groups: dict[str, ProjectionGroup] = {}
        self._layers: dict[str, MixedLinear] = {}
        self._shelves: dict[frozenset[tuple[str, GroupLayout]], Shelf] = {}

    @property
    def residents(self) -> frozenset[ResidentAdapter]:
        """The adapters that rows may use."""
        return frozenset(self._routing.placements)

    @property
    def resident_bytes(self) -> int:
        """What the bank really takes, free slots included."""
        return sum(shelf.size_bytes for shelf in self._shelves.values())

    def prepare(self, container: AdapterContainer) -> PreparedAdapter:
        """Check `container` against the model and lay its weights out; changes nothing.

        Raises:
            InvalidAdapterError: it does not fit the model; every problem is listed.
        """
        weights = container.check(self._model)
        default = self._float_dtype
        linears = {path: module_at(self._model, path) for path in weights}
        others = [path for path, linear in linears.items() if kind_of(linear) is not ModuleKind.LINEAR]
        if others:
            raise InvalidAdapterError(
                container.digest,
                [f"{path}: only linear layers can be served beside other adapters" for path in others],
            )
        names = group_projections({path: weight_shape(linears[path])[1] for path in weights})
        groups = {name: _lay_out(paths, weights, linears, default) for name, paths in names.items()}
        largest = max((linear.scale for linear in weights.values()), key=abs)
        # A product with the scale less in each forward; in float32, what B loses by it does not show.
        scale = 1.0 if all(group.dtype == mx.float32 for group in groups.values()) else largest
        rows = {
            name: groups[name].pack(
                {path: _factors(linears[path], weights[path], scale, default) for path in paths}
            )
            for name, paths in names.items()
        }
        mx.eval(rows)
        resident = ResidentAdapter(
            digest=container.digest,
            type=container.config.fine_tune_type.value,
            rank=max(linear.lora_a.shape[1] for linear in weights.values()),
            scale=largest,
            paths=tuple(sorted(weights)),
            size_bytes=sum(row.nbytes for row in rows.values()),
        )
        return PreparedAdapter(resident, scale, groups, rows)

    def add(self, adapter: PreparedAdapter | AdapterContainer) -> ResidentAdapter:
        """Make `adapter` available to rows; a container is prepared first.

        Raises:
            InvalidAdapterError: it does not fit the model.
            ContainerStateError: it is resident already.
        """
        prepared = self.prepare(adapter) if isinstance(adapter, AdapterContainer) else adapter
        resident, placements = prepared.resident, self._routing.placements
        if resident in placements:
            raise ContainerStateError(f"adapter {resident.digest} is resident already")
        shelf = self._shelf(prepared.groups)
        try:
            slot = shelf.put(resident, prepared.rows)
            placements[resident] = Placement(shelf.layout, slot, prepared.scale)
        finally:
            if not shelf.slots:
                self._clear(shelf)
        return resident

    def copy_of(self, resident: ResidentAdapter) -> PreparedAdapter | None:
        """What `add` needs to bring `resident` back bit for bit, copied; None if it is not resident."""
        placement = self._routing.placements.get(resident)
        if placement is None:
            return None
        groups = placement.layout.groups
        rows = self._shelves[frozenset(groups.items())].rows_of(resident)
        return PreparedAdapter(resident, placement.scale, dict(groups), rows)

    def remove(self, resident: ResidentAdapter) -> int:
        """Drop `resident` and return the bytes that this freed.

        Raises:
            ContainerStateError: it is not resident.
        """
        placements = self._routing.placements
        if resident not in placements:
            raise ContainerStateError(f"adapter {resident.digest} is not resident")
        before = self.resident_bytes
        layout = placements.pop(resident).layout
        shelf = self._shelves[frozenset(layout.groups.items())]
        if shelf.drop(resident):
            for one, slot in shelf.slots.items():
                placements[one] = placements[one]._replace(slot=slot)
            self._routing.generation += 1
        if not shelf.slots:
            self._clear(shelf)
        return before - self.resident_bytes

    def close(self) -> None:
        """Remove every adapter; the model is as it was before the first."""
        for shelf in list(self._shelves.values()):
            for resident in shelf.slots:
                del self._routing.placements[resident]
            self._clear(shelf)

    def _shelf(self, groups: dict[str, GroupLayout]) -> Shelf:
        """The shelf for adapters that lie as `groups` say; a new one wraps the layers that are not yet."""
        key = frozenset(groups.items())
        if key in self._shelves:
            return self._shelves[key]
        shelf = Shelf(Layout(groups))
        new: dict[str, MixedLinear] = {}
        for name, group in groups.items():
            owner = self._groups.setdefault(name, ProjectionGroup(self._routing))
            for projection in group.projections:
                path = projection.path
                if path not in self._layers:
                    new[path] = MixedLinear(path, module_at(self._model, path), owner)
        replace_modules(self._model, new)
        self._layers.update(new)
        for name, stack in shelf.stacks.items():
            self._groups[name].stacks[shelf.layout] = stack
            self._groups[name].layers.update({p.path: self._layers[p.path] for p in groups[name].projections})
        self._shelves[key] = shelf
        return shelf

    def _clear(self, shelf: Shelf) -> None:
        """Take an empty shelf down, and unwrap the layers that no other serves."""
        del self._shelves[frozenset(shelf.layout.groups.items())]
        for name in shelf.layout.groups:
            del self._groups[name].stacks[shelf.layout]
        used = {path for other in self._shelves.values() for path in other.layout.paths}
        gone = [path for path in shelf.layout.paths if path not in used]
        replace_modules(self._model, {path: self._layers.pop(path).reverted() for path in gone})
        for name in shelf.layout.groups:
            group = self._groups[name]
            group.layers = {path: layer for path, layer in group.layers.items() if path in self._layers}
            if not group.stacks:
                del self._groups[name]


def _lay_out(
    paths: list[str], weights: dict[str, ModuleWeights], linears: dict[str, nn.Module], default: mx.Dtype
) -> GroupLayout:
    """A dtype that holds the file's and the layers', and the ranks in their buckets."""
    numbers = [mx.zeros(1, compute_dtype(linears[path], default)) for path in paths]
    numbers += [mx.zeros(1, weights[path].lora_a.dtype) for path in paths]
    projections = []
    for path in paths:
        out_size, in_size = weight_shape(linears[path])
        projections.append(Projection(path, bucket_rank(weights[path].lora_a.shape[1]), in_size, out_size))
    is_dora = weights[paths[0]].magnitude is not None
    return GroupLayout(tuple(projections), is_dora, sum(numbers[1:], numbers[0]).dtype)


def _factors(linear: nn.Module, weights: ModuleWeights, scale: float, default: mx.Dtype) -> Factors:
    """A and B such that `scale`·B A is the delta; for DoRA, m / ‖W + s·B A‖ as (out,)."""
    a, b, factor = weights.lora_a.T, weights.lora_b, None
    if weights.magnitude is not None:
        base = dense_weight(linear).astype(mx.float32)
        delta = (weights.scale * b.T.astype(mx.float32)) @ a.astype(mx.float32)
        norm = mx.linalg.norm(base + delta, axis=1)
        factor = (weights.magnitude.astype(mx.float32) / norm).astype(compute_dtype(linear, default))
    return Factors(a, b if weights.scale == scale else b * (weights.scale / scale), factor)


def _float_dtype(model: nn.Module) -> mx.Dtype:
    for _, array in cast("list[tuple[str, mx.array]]", tree_flatten(model.parameters())):
        if mx.issubdtype(array.dtype, mx.floating):
            return array.dtype
    return mx.float32
