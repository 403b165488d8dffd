"""The adapters that are resident beside one model: prepared, added, removed.

`prepare` reads the model and may run on any thread, so that a load does not hold up a forward; `add`
and `remove` change the model and run on the thread that owns it, between two forwards. The bank knows
no names, versions or requests: whoever removes a resident makes sure that no row uses it any more.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .container import AdapterContainer
from .errors import ContainerStateError, InvalidAdapterError, UnsupportedModelError
from .formats.peft.copies import copies_bytes
from .formats.peft.heads import tied_embedding
from .formats.protocol import Mapped
from .layers.module_weights import ModuleWeights
from .layers.modules import ModuleKind, kind_of
from .layers.split import undivided
from .layers.surgery import replace_modules
from .layers.targets import module_at, named_base_modules
from .mixed.embedding import MixedEmbedding, TiedHead
from .mixed.experts import ExpertGroups, MixedExperts, routes_rows, switch_layers
from .mixed.laying_out import float_dtype, group_modules, lay_out
from .mixed.layout import GroupLayout, Layout
from .mixed.linear import MixedLinear, ProjectionGroup
from .mixed.plan import Placement
from .mixed.residents import ResidentAdapter
from .mixed.routing import Routing
from .mixed.split import MixedSplitLinear
from .mixed.stacks import Shelf
from .report import LoadReport, parts_of

Mixed = MixedLinear | MixedSplitLinear | MixedEmbedding | MixedExperts

__all__ = ["AdapterBank", "PreparedAdapter"]


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
        self._float_dtype = float_dtype(model)
        self._copies_bytes = copies_bytes(model)
        self._groups: dict[str, ProjectionGroup] = {}
        self._wrappers: dict[str, Mixed] = {}
        self._shelves: dict[frozenset[tuple[str, GroupLayout]], Shelf] = {}

    @property
    def residents(self) -> frozenset[ResidentAdapter]:
        """The adapters that rows may use."""
        return frozenset(self._routing.placements)

    @property
    def copies_bytes(self) -> int:
        """What an adapter's file may hold of the model's own weights at most."""
        return self._copies_bytes

    @property
    def resident_bytes(self) -> int:
        """What the bank really takes, free slots included. May be read on any thread."""
        return sum(shelf.size_bytes for shelf in tuple(self._shelves.values()))

    def warm(self) -> int:
        """Compile what decoding needs on this device, for any adapter; returns how many kernels.

        Without it, the first adapter of a kind waits for a compiler, and so does who decodes beside it.
        """
        kernels = self._routing.kernels
        if kernels is None:
            return 0
        linears = [one for _, one in self._model.named_modules() if isinstance(one, nn.Linear)]
        return kernels.warm(self._float_dtype, linears)

    def prepare(self, container: AdapterContainer) -> PreparedAdapter:
        """Check `container` against the model and lay its weights out; changes nothing.

        Raises:
            InvalidAdapterError: it does not fit the model, or its numbers are not finite once the scale is
                taken in; every problem is listed.
            UnsupportedModelError: it adapts modules that cannot be served in mixed batches; all are named.
        """
        mapped = container.place(self._model)
        weights = mapped.weights
        modules = {path: module_at(self._model, path) for path in weights}
        self._require_served(modules, weights)
        laid_out = lay_out(weights, modules, self._float_dtype)
        if laid_out.problems:
            raise InvalidAdapterError(container.source, laid_out.problems)
        resident = ResidentAdapter(
            digest=container.digest,
            type=container.type.value,
            rank=max(module.file_rank for module in weights.values()),
            scale=max((module.scale for module in weights.values()), key=abs),
            paths=tuple(sorted(weights)),
            size_bytes=sum(row.nbytes for row in laid_out.rows.values()),
            format=container.format,
            report=_report(container, mapped, modules),
        )
        return PreparedAdapter(resident, laid_out.scale, laid_out.groups, laid_out.rows)

    def add(self, adapter: PreparedAdapter | AdapterContainer) -> ResidentAdapter:
        """Make `adapter` available to rows; a container is prepared first.

        Raises:
            InvalidAdapterError: it does not fit the model.
            UnsupportedModelError: the model reads the weight of an embedding that it adapts.
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
        owners = {name: self._groups.get(name, ProjectionGroup(self._routing)) for name in groups}
        new: dict[str, Mixed] = {}
        for name, group in groups.items():
            for path in group.ranks:
                place = group.place_of(path)
                if place not in self._wrappers and place not in new:
                    new[place] = self._wrapper(place, owners[name])
        surgery = replace_modules(self._model, new)
        if any(isinstance(wrapper, MixedEmbedding) for wrapper in new.values()):
            try:
                self._trace()
            except BaseException:
                surgery.undo()
                raise
        self._wrappers.update(new)
        self._groups.update(owners)
        for name, stack in shelf.stacks.items():
            owners[name].stacks[shelf.layout] = stack
            for path in groups[name].ranks:
                owners[name].bases[path] = _as_linear(module_at(self._model, path))
        self._shelves[key] = shelf
        return shelf

    def _wrapper(self, place: str, owner: ProjectionGroup) -> Mixed:
        module = module_at(self._model, place)
        match kind_of(module):
            case ModuleKind.LINEAR:
                return MixedLinear(place, module, owner)
            case ModuleKind.SPLIT:
                return MixedSplitLinear(place, module, owner)
            case ModuleKind.EMBEDDING:
                return MixedEmbedding(place, module, owner)
            case _:
                layers = {f"{place}.{name}": layer for name, layer in switch_layers(module).items()}
                names = {path: name for name, paths in group_modules(layers).items() for path in paths}
                return MixedExperts(place, module, ExpertGroups(self._routing, names, self._groups))

    def _trace(self) -> None:
        """Build one forward and compute nothing: a model that reads an embedding's weight itself fails."""
        self._model(mx.zeros((1, 1), dtype=mx.int32), cache=make_prompt_cache(self._model))

    def _require_served(self, modules: dict[str, nn.Module], weights: dict[str, ModuleWeights]) -> None:
        """Refuse switch layers whose tokens could not be told apart by row, and heads that scale features."""
        problems: list[str] = []
        both = [path for path, one in weights.items() if one.by_feature and not one.lookup_only]
        if both and (tied := tied_embedding(dict(named_base_modules(self._model)))) in both:
            problems.append(f"{tied}: a DoRA by feature is served for look-ups alone")
        for path, module in modules.items():
            if kind_of(module) is ModuleKind.SWITCH:
                parent = module_at(self._model, path.rpartition(".")[0])
                if not routes_rows(parent):
                    problems.append(
                        f"{path} lies in a {type(parent).__name__}; in mixed batches, switch layers are "
                        "served in mlx-lm's SwitchGLU and SwitchMLP alone"
                    )
        if problems:
            raise UnsupportedModelError(problems)

    def _clear(self, shelf: Shelf) -> None:
        """Take an empty shelf down, and unwrap the layers that no other serves."""
        del self._shelves[frozenset(shelf.layout.groups.items())]
        for name in shelf.layout.groups:
            del self._groups[name].stacks[shelf.layout]
        used = {place for other in self._shelves.values() for place in other.layout.places}
        gone = shelf.layout.places - used
        replace_modules(self._model, {place: self._wrappers.pop(place).reverted() for place in gone})
        for name in shelf.layout.groups:
            group = self._groups[name]
            kept = {path for layout in group.stacks for path in layout.groups[name].ranks}
            group.bases = {path: base for path, base in group.bases.items() if path in kept}
            if not group.stacks:
                del self._groups[name]


def _report(container: AdapterContainer, mapped: Mapped, modules: dict[str, nn.Module]) -> LoadReport:
    parts = parts_of(mapped.weights, {path: kind_of(module) for path, module in modules.items()})
    return LoadReport.of(container, parts, mapped.warnings)


def _as_linear(module: nn.Module) -> nn.Module:
    """The linear layer that a group computes the base output with."""
    match kind_of(module):
        case ModuleKind.SPLIT:
            return undivided(module)
        case ModuleKind.EMBEDDING:
            return TiedHead(module)
        case _:
            return module
