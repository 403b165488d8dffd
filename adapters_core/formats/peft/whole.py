"""Whole weights of base modules in a PEFT file: copies of the base's, and modules that were trained whole.

All rows of a batch share the base, so that no weight can stand in its place. But most files hold what the
base has anyway, or new rows for a few tokens, which are a LoRA exactly (`tokens.row_weights`). Whatever is
neither is refused, with how much of it differs. Biases that were trained (`bias`) become the adapter's own.
Where a head is tied to its embedding, PEFT computes with

| in the file                                 | for look-ups | for the head                             |
|---------------------------------------------|--------------|------------------------------------------|
| the embedding, whole (`modules_to_save`)    | it           | the base's; it, with ensure_weight_tying |
| the head, whole                             | the base's   | it                                       |
| either as a copy, into what both share      | it           | it                                       |

Changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from ...config import CONFIG_FILE
from ...layers.module_weights import ModuleWeights
from ...layers.modules import ModuleKind, is_quantized, kind_of, weight_shape
from .arriving import arrived_tensors
from .config import PeftConfig
from .copies import changed_rows, is_copy
from .heads import tied_embedding
from .names import HEADS, WholeName, is_head
from .places import Places
from .targets import is_saved_whole
from .ties import saved_are_tied
from .tokens import MAX_ROWS, has_rows, row_weights

__all__ = ["WholeMapping"]

_SHOWN_NAMES = 8
_SHARED = "all rows of a batch share the base"
_MERGE = "merge the adapter into its base and serve that"


@dataclass(frozen=True, slots=True)
class _Whole:
    """A parameter in the file: its module's path in the transformers model, the tensor with its name.

    `arrived` is what loading may have made of it, by the dtype of the checkpoint (`arrived_tensors`).
    """

    path: str
    name: str
    tensor: mx.array
    arrived: list[mx.array]


class WholeMapping:
    """The whole weights of one adapter on one model; `map` adds to weights, problems and warnings."""

    def __init__(
        self,
        places: Places,
        config: PeftConfig,
        adapted: Mapping[str, ModuleWeights],
    ) -> None:
        """`adapted` is what the file has factors for, by path in the model."""
        self.weights: dict[str, ModuleWeights] = {}
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._modules = {path: module for path, module in places.modules.items() if "weight" in module}
        self._tied = tied_embedding(self._modules)
        self._ties = saved_are_tied(config.fields)  # PEFT gives the head what it gives the embedding
        self._places = places
        self._config = config
        self._adapted = adapted
        self._copies: list[str] = []
        self._biases: list[str] = []

    def map(self, wholes: Mapping[str, WholeName], tensors: Mapping[str, mx.array]) -> None:
        """Map the `tensors` that `wholes` names."""
        found: dict[str, _Whole] = {}
        biases: dict[str, _Whole] = {}
        for name, whole in wholes.items():
            arrival = self._places.of_parameter(f"{whole.path}.{whole.parameter}")
            made = [tensors[name]] if arrival is None else arrived_tensors(tensors[name], arrival)
            one = _Whole(whole.path, name, tensors[name], made)
            kept = biases if whole.parameter == "bias" else found
            if whole.is_original:
                self._require_own(one, whole.parameter)
            elif not _same(first := kept.setdefault(one.path, one), one):
                self._refuse(one, f"{first.name} is another {whole.parameter} of the same module")
        self._find_missing(found)
        if (place := self._tied) is not None:
            embedding = next((path for path in found if self._place(path) == place), "")
            head = next((path for path in found if is_head(path)), "")
            self._map_tied(place, found.pop(embedding, None), found.pop(head, None))
        for one in found.values():
            self._settle(one, self._place(one.path))
        for one in biases.values():
            self._settle_bias(one)
        self._tell_copies()
        if self._biases:
            self.warnings.append(
                f"The file has {len(self._biases)} bias(es) that are not the base's, the first of "
                f"{min(self._biases)}; they are served as the adapter's own."
            )

    def _map_tied(self, place: str, embedding: _Whole | None, head: _Whole | None) -> None:
        """Settle the embedding at `place` and the head that is tied to it, as the table at the top says."""
        is_whole = embedding is not None and self._is_saved(embedding.path)
        is_shared = head is not None and not self._is_saved(head.path)
        if embedding is not None and head is not None and (self._ties or (is_shared and not is_whole)):
            head = head if _same(embedding, head) else self._refuse_second(head, embedding)
        looked_up = head if embedding is None and is_shared else embedding
        used = looked_up if self._ties or (head is None and not is_whole) else head
        if looked_up is not None and used is not None and _same(looked_up, used):
            self._settle(looked_up, place)
            return
        if used is not None:
            self._settle_tied_head(used, place)
        if looked_up is not None:
            self._settle(looked_up, place, lookup_only=True)

    def _settle_tied_head(self, head: _Whole, place: str) -> None:
        rows = self._changed(head, self._modules[place])
        if rows:
            self._refuse(
                head,
                f"a weight that is not the base's: the head is tied to the embedding {place}, so that it "
                f"cannot have rows of its own; {_MERGE}, or train both with ensure_weight_tying",
            )
        elif rows is not None and self._is_saved(head.path):
            self._copies.append(head.path)

    def _settle(self, one: _Whole, place: str, *, lookup_only: bool = False) -> None:
        """Keep what the weight changes of the module at `place`, if anything can be."""
        module = self._modules.get(place)
        rows = self._changed(one, module)
        if module is None or rows is None:
            return
        if not rows:
            self._copies += [one.path] if self._is_saved(one.path) else []
            return
        count = weight_shape(module)[0]
        if (reason := self._unfit(place, module, len(rows), count)) is not None:
            self._refuse(one, f"a weight that is not the base's: {reason}; {self._advice(one)}")
            return
        new, is_dora = one.arrived[0][mx.array(rows)], self._config.fields.use_dora
        weights = row_weights(module, rows, new, is_dora=is_dora)
        self.weights[place] = replace(weights, lookup_only=lookup_only)
        self.warnings.append(
            f"The file has a whole weight for {one.path}, and {len(rows)} of its {count} rows are not the "
            "base's; these are served as trained tokens."
        )

    def _unfit(self, place: str, module: nn.Module, changed: int, count: int) -> str | None:
        """Why `changed` of `count` rows of the module at `place` cannot be served beside the base's."""
        differ = f"{changed} of its {count} rows differ"
        if not has_rows(module):
            return f"a {type(module).__name__} has no rows that could be"
        if changed > (limit := min(MAX_ROWS, count // 2)):
            return f"{differ}, and up to {limit} can be served beside the base"
        if place in self._adapted:
            return f"{differ}, and the file has factors for this module as well"
        return None

    def _changed(self, one: _Whole, module: nn.Module | None) -> list[int] | None:
        """The rows that are not the base's; None, and a problem, if it is no weight of this module."""
        if module is None:
            self._refuse(one, "a weight of the base, of a module that the model does not have")
        elif one.arrived[0].shape != weight_shape(module):
            self._refuse(
                one,
                f"a weight of the base of shape {one.tensor.shape}, where the base has "
                f"{weight_shape(module)}; {_SHARED}. If the vocabulary was resized, serve the adapter beside "
                "a base of that size",
            )
        else:
            return min((changed_rows(made, module) for made in one.arrived), key=len)
        return None

    def _require_own(self, one: _Whole, parameter: str) -> None:
        """Refuse what the file says is the base's own weight or bias, if it is not."""
        module = self._module(one.path)
        if parameter == "bias":
            is_own = _is_copy(one, None if module is None else module.get("bias"))
        else:
            is_own = not self._changed(one, module)
        if not is_own:
            self._refuse(one, f"a {parameter} that is not the base's, named as one; {_SHARED}")

    def _settle_bias(self, one: _Whole) -> None:
        """Keep what the bias changes of its module, as a bias of the adapter's own."""
        place = self._place(one.path, "bias")
        module = self._modules.get(place)
        own = None if module is None else module.get("bias")
        if _is_copy(one, own):
            return
        reason = None
        if module is None or own is None or own.shape != one.arrived[0].shape:
            reason = "the base has none of this shape"
        elif kind_of(module) is not ModuleKind.LINEAR:
            reason = f"a {type(module).__name__} can have no other bias beside it"
        elif self._config.fields.use_dora:
            reason = "beside use_dora none can be served"
        if module is None or own is None or reason is not None:
            self._refuse(one, f"a bias that is not the base's: {reason}; {_SHARED}: {_MERGE}")
            return
        weights = self.weights.get(place) or self._adapted.get(place) or _nought(module)
        self.weights[place] = _with_bias(weights, own, one.arrived[0])
        self._biases.append(one.path)

    def _find_missing(self, found: Collection[str]) -> None:
        """Modules that the config says were saved whole, and the file does not have."""
        wanted = []
        for path, module in self._modules.items():
            # What mlx-lm made of several modules has no name there.
            is_single = kind_of(module) is not None or len(weight_shape(module)) == 1
            if is_single:
                wanted += [name for name in self._places.names_of(path) if self._is_saved(name)]
        if self._tied is not None and not self._ties and self._is_saved(HEADS[0]):
            wanted += [] if any(is_head(path) for path in found) else [HEADS[0]]
        self.problems += [
            f"module {name}: expected its weight, the file has none, though {CONFIG_FILE} says that it was "
            "saved whole (modules_to_save)"
            for name in wanted
            if name not in found
        ]

    def _tell_copies(self) -> None:
        if not self._copies:
            return
        shown = ", ".join(sorted(self._copies)[:_SHOWN_NAMES])
        shown += ", …" if len(self._copies) > _SHOWN_NAMES else ""
        is_rounded = any(
            (module := self._module(path)) is not None and is_quantized(module) for path in self._copies
        )
        rounding = "; changes below the rounding of the quantised base cannot be seen" if is_rounded else ""
        self.warnings.append(
            f"Saved whole (modules_to_save) and no other than the base's own, so that nothing is served of "
            f"{len(self._copies)} module(s): {shown}{rounding}."
        )

    def _module(self, name: str) -> nn.Module | None:
        """The module of this name; the embedding for a head that is tied to it."""
        place: str | None = self._place(name)
        if place not in self._modules and is_head(name):
            place = self._tied
        return self._modules.get(place or "")

    def _place(self, name: str, parameter: str = "weight") -> str:
        """The path of the module whose parameter that of the module `name` is; "" for none."""
        arrival = self._places.of_parameter(f"{name}.{parameter}")
        return "" if arrival is None else arrival.module

    def _is_saved(self, name: str) -> bool:
        return is_saved_whole(self._config.fields, name)

    def _advice(self, one: _Whole) -> str:
        if self._is_saved(one.path):
            return f"it was trained whole (modules_to_save). Train with trainable_token_indices, or {_MERGE}"
        return f"it was trained, or belongs to another base. {_SHARED.capitalize()}: {_MERGE}"

    def _refuse_second(self, head: _Whole, embedding: _Whole) -> None:
        # PEFT loads both into one weight; which of them stays is a matter of their order.
        self._refuse(head, f"{embedding.name} is another weight, and embedding and head share theirs")

    def _refuse(self, one: _Whole, reason: str) -> None:
        self.problems.append(f"tensor {one.name}: not expected: {reason}")


def _nought(module: nn.Module) -> ModuleWeights:
    """Factors for a linear layer that change nothing."""
    rows, columns = weight_shape(module)
    return ModuleWeights(mx.zeros((columns, 1)), mx.zeros((1, rows)), None, 1.0)


def _with_bias(weights: ModuleWeights, old: mx.array, new: mx.array) -> ModuleWeights:
    """`weights` with a bias that makes the base's `old` one the `new` one, beside one that they have."""
    added = new.astype(mx.float32) - old.astype(mx.float32)
    if not weights.scale:
        weights = replace(weights, lora_b=mx.zeros_like(weights.lora_b), bias=None, scale=1.0)
    added = added / weights.scale
    return replace(weights, bias=added if weights.bias is None else weights.bias.astype(mx.float32) + added)


def _is_copy(one: _Whole, own: mx.array | None) -> bool:
    return any(is_copy(made, own) for made in one.arrived)


def _same(left: _Whole, right: _Whole) -> bool:
    return bool(mx.array_equal(left.tensor, right.tensor).item())
