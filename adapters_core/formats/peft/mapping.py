"""Maps the factors of a PEFT file onto an MLX model: the place, the orientation and the scale of each.

What PEFT would do with the same folder and base is the reference: a module is adapted if the config targets
it and the file has its factors. Whatever is targeted and not in the file, or in the file and not targeted,
is a problem, and every problem is listed. Changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from ...config import CONFIG_FILE
from ...layers.module_weights import ModuleWeights
from ...layers.modules import ModuleKind, kind_of, no_dora, weight_shape
from ..protocol import Mapped
from .arrivals import Arrival
from .arriving import arrived, joined, times
from .config import PeftConfig
from .experts import ExpertMapping
from .factors import Contents, Factors, Shape, sort_tensors
from .heads import tied_embedding
from .module_factors import left_out, module_weights
from .names import HEADS, Leaf, is_head
from .parameters import old_layout, target_weight
from .paths import any_layer
from .places import Places
from .routers import router_name
from .targets import all_linear, is_target, rank_and_scale
from .tied_heads import as_head
from .ties import TIED_NAMES, targets_are_tied
from .tokens import token_indices, token_weights
from .whole import WholeMapping

__all__ = ["map_onto"]

_MERGE = "merge the adapter into its base and serve that"
_TRANSPOSED = (
    "the weight lies transposed in transformers, and so would the factors of a parameter; name it in "
    "target_modules"
)

Tensors = Mapping[str, mx.array]
_UNLIKE_HEAD = (
    "the head that is tied to the embedding has its factors, and another rank or scale by rank_pattern or "
    "alpha_pattern; give both the same"
)


def map_onto(model: nn.Module, config: PeftConfig, tensors: Tensors) -> Mapped:
    """The weights by path in `model`, with every problem."""
    return _Mapping(model, config, sort_tensors(tensors), tensors).result()


class _Mapping:
    """One adapter and one model; `weights` and `problems` grow as its modules are taken one by one."""

    def __init__(self, model: nn.Module, config: PeftConfig, contents: Contents, tensors: Tensors) -> None:
        self._model = model
        self._config = config
        self._contents = contents
        self._tensors = tensors
        rows = {path: _rows(factors) for (path, _), factors in contents.factors.items()}
        wholes = {
            f"{whole.path}.{whole.parameter}": tensors[name].shape for name, whole in contents.wholes.items()
        }
        self._places = Places(model, rows, wholes)
        self._modules = self._places.adaptable
        self._tied = tied_embedding(self._modules)
        model_type = str(getattr(model, "model_type", None))
        self._experts = ExpertMapping(model_type, self._modules, self._places.rule, config)
        self._weights: dict[str, ModuleWeights] = {}
        self._parts: dict[str, list[tuple[Arrival, ModuleWeights, Factors]]] = defaultdict(list)
        self._problems = list(contents.problems)
        self._seen: set[str] = set()

    def result(self) -> Mapped:
        for factors in self._contents.factors.values():
            if self._places.of(factors.path) or not self._experts.take(factors):
                self._take(factors)
        self._join()
        self._experts.finish()
        self._weights |= self._experts.weights
        self._problems += self._experts.problems
        self._find_missing()
        warnings = self._map_wholes()
        if not self._weights and not self._problems:
            self._problems.append("expected tensors of an adapter, the file has none")
        mx.eval([[one.lora_a, one.lora_b, one.magnitude, one.bias] for one in self._weights.values()])
        return Mapped(self._weights, self._problems, tuple(warnings))

    def _take(self, factors: Factors) -> None:
        places = self._places.of(factors.path)
        kinds = {kind_of(self._places.modules[one.module]) for one in places}
        if not places and self._tied is not None and is_head(factors.path):
            self._take_tied_head(factors)
            return
        if reason := self._nowhere(factors, kinds):
            self._problems += factors.refused(reason)
            return
        self._seen.update(one.module for one in places)
        module = self._modules[places[0].module]
        if Leaf.TOKENS in factors.tensors and (indices := token_indices(self._config, factors.path)):
            self._take_tokens(factors, places, indices)
            return
        is_embedding = ModuleKind.EMBEDDING in kinds
        weight = self._parameter(factors.path, module)
        problems = self._left_out(factors, places, weight)
        if self._config.fields.use_dora and (reason := no_dora(module)):
            problems += factors.refused(f"a {type(module).__name__} cannot have magnitudes: {reason}")
        if problems:
            self._problems += problems
            return
        shape = self._shape(factors, places)
        weights, problems = module_weights(
            self._config, factors, is_embedding=is_embedding, shape=shape, name=weight
        )
        self._problems += problems
        if weights is not None:
            self._arrive(factors, places, weights, is_embedding)

    def _arrive(
        self, factors: Factors, places: Sequence[Arrival], weights: ModuleWeights, is_embedding: bool
    ) -> None:
        """Keep what the `weights` of the transformers module are for each place where it arrives."""
        for arrival in places:
            own = arrived(weights, arrival, is_embedding=is_embedding)
            if isinstance(own, str):
                self._problems += factors.refused(own)
                return
            if not is_embedding:
                self._parts[arrival.module].append((arrival, own, factors))
            elif (embedding := self._embedding(arrival.module, factors, own)) is not None:
                self._weights[arrival.module] = embedding

    def _nowhere(self, factors: Factors, kinds: set[ModuleKind | None]) -> str | None:
        """Why the factors belong to no linear layer or embedding of the model, if that is so."""
        places = self._places.of(factors.path)
        if not places and (reason := self._places.reason(factors.path)):
            return reason
        if not places or factors.depth or ModuleKind.SWITCH in kinds:
            return f"the model has no module {factors.path} that can be adapted"
        if len(kinds) == 1 and None not in kinds and all(one.index is None for one in places):
            return None
        made = ", ".join(f"{one}, a {type(self._places.modules[one]).__name__}" for one in _modules(places))
        return f"mlx-lm makes of it {made}, which cannot be adapted; {_MERGE}"

    def _shape(self, factors: Factors, places: Sequence[Arrival]) -> Shape:
        """The shape (rows, columns) of the transformers weight that arrives at `places`."""
        rows, columns = weight_shape(self._modules[places[0].module])
        is_all = len(places) == 1 and places[0].is_plain
        return (rows if is_all else _rows(factors) or rows), columns

    def _take_tokens(self, factors: Factors, places: Sequence[Arrival], indices: list[int]) -> None:
        if len(places) > 1 or places[0].rows is not None:
            self._problems += factors.refused("mlx-lm changes the order of its rows on loading; " + _MERGE)
            return
        path, by_row = places[0].module, places[0].factors
        if by_row is not None and max(indices) < len(by_row):
            own = times(factors.tensors[Leaf.TOKENS], mx.array(by_row[indices])[:, None])
            factors = replace(factors, tensors={**factors.tensors, Leaf.TOKENS: own})
        weights, problems = token_weights(self._config, factors, indices, self._modules[path])
        self._weights |= {} if weights is None else {path: weights}
        self._problems += problems

    def _join(self) -> None:
        """Make one of what arrives in the same module."""
        for path, parts in self._parts.items():
            rows = weight_shape(self._modules[path])[0]
            whole = joined([(arrival, weights) for arrival, weights, _ in parts], rows)
            if isinstance(whole, str):
                for _, _, factors in parts:
                    self._problems += factors.refused(whole)
            else:
                self._weights[path] = whole

    def _left_out(self, factors: Factors, places: Sequence[Arrival], weight: str | None) -> list[str]:
        """Problems if the config adapts neither the module nor its `weight` as a parameter that is known."""
        if weight is None:
            return left_out(self._config, factors, is_linear=_is_linear(self._modules[places[0].module]))
        if reason := old_layout(self._config):
            return factors.refused(reason)
        if any(one.is_transposed for one in places):
            return factors.refused(_TRANSPOSED)
        return []

    def _parameter(self, name: str, module: nn.Module) -> str | None:
        """The name of the module's weight if not the module is a target, but this parameter."""
        if not _is_linear(module) or self._is_target(name, module):
            return None
        return target_weight(self._config, name)

    def _embedding(self, path: str, factors: Factors, weights: ModuleWeights) -> ModuleWeights | None:
        """`weights` of the embedding at `path` with what becomes of a head that is tied to it."""
        if path != self._tied:
            return weights
        is_tied = targets_are_tied(self._config.fields)
        reason = None
        if is_tied and weights.by_feature:
            reason = (
                "with ensure_weight_tying and use_dora, PEFT scales the embedding's features and the rows of "
                "the head that is tied to it; train with one of the two, or merge the adapter into its base"
            )
        elif is_tied and self._is_tied_otherwise(factors.path):
            reason = _UNLIKE_HEAD
        if reason is not None:
            self._problems += factors.refused(reason)
            return None
        # To PEFT, a tied head is a linear layer that shares the weight and not the adapter.
        return replace(weights, lookup_only=not is_tied)

    def _is_tied_otherwise(self, embedding: str) -> bool:
        """Whether ensure_weight_tying gives head and embedding the same factors and not the same scale."""
        return rank_and_scale(self._config, HEADS[0]) != rank_and_scale(self._config, embedding)

    def _take_tied_head(self, factors: Factors) -> None:
        """With ensure_weight_tying, the head's factors are the embedding's own, transposed.

        Else it may be adapted alone.
        """
        factors_of_all = self._contents.factors.values()
        embeddings = [one for one in factors_of_all if self._places.path_of(one.path) == self._tied]
        is_tied = targets_are_tied(self._config.fields)
        shared = [one for one in embeddings if is_tied and _is_transposed(factors, one)]
        own = rank_and_scale(self._config, factors.path)
        if any(rank_and_scale(self._config, one.path) != own for one in shared):
            self._problems += factors.refused(_UNLIKE_HEAD)
        elif self._tied is not None and not is_tied and not embeddings and Leaf.A in factors.tensors:
            weights, problems = as_head(self._model, self._tied, self._config, factors)
            self._problems += problems
            self._weights |= {} if weights is None else {self._tied: weights}
        elif not shared:
            self._problems += factors.refused(
                "the model's head is tied to its embedding, so that it cannot have rows of its own, or "
                "factors beside others of the embedding; train both with ensure_weight_tying, which PEFT "
                f"heeds where target_modules name {' or '.join(TIED_NAMES)}, or merge the adapter into its "
                "base"
            )

    def _map_wholes(self) -> Sequence[str]:
        """Map the weights of whole modules; returns warnings."""
        wholes = WholeMapping(self._places, self._config, self._weights)
        wholes.map(self._contents.wholes, self._tensors)
        self._weights |= wholes.weights
        self._problems += wholes.problems
        return wholes.warnings

    def _find_missing(self) -> None:
        """Modules that the config targets and the file has no factors for."""
        adapted = {any_layer(path) for path in self._seen}
        named = {path for path, _ in self._contents.factors}
        for path, module in self._modules.items():
            if path in self._seen or kind_of(module) is ModuleKind.SWITCH:
                continue
            # What is a linear layer here need not be one in the model that was trained (a router's gate).
            if all_linear(self._config.fields) and any_layer(path) not in adapted:
                continue
            self._problems += [
                f"module {name}: expected tensors, the file has none, though {CONFIG_FILE} targets it"
                for name in self._places.names_of(self._named(path))
                if name not in named and self._is_wanted(name, module)
            ]

    def _named(self, path: str) -> str:
        """`path` as a name that is looked for among the targets."""
        return router_name(self._modules, path) if self._config.fields.target_parameters else path

    def _is_wanted(self, name: str, module: nn.Module) -> bool:
        if self._is_target(name, module) or token_indices(self._config, name):
            return True
        return self._parameter(name, module) is not None

    def _is_target(self, name: str, module: nn.Module) -> bool:
        return is_target(self._config.fields, name, is_linear=_is_linear(module), is_head=is_head(name))


def _rows(factors: Factors) -> int | None:
    """How many rows the weight has that the factors are for, as far as they say it."""
    for leaf, axis in ((Leaf.EMBEDDING_A, 1), (Leaf.B, 0)):
        tensor = factors.tensors.get(leaf)
        if tensor is not None and tensor.ndim == 2:
            return tensor.shape[axis]
    return None


def _modules(places: Sequence[Arrival]) -> list[str]:
    return list(dict.fromkeys(one.module for one in places))


def _is_linear(module: nn.Module) -> bool:
    return kind_of(module) in (ModuleKind.LINEAR, ModuleKind.SPLIT)


def _is_transposed(head: Factors, embedding: Factors) -> bool:
    """Whether the head's A is the embedding's Bᵀ, and its B the embedding's Aᵀ."""
    pairs = ((Leaf.A, Leaf.EMBEDDING_B), (Leaf.B, Leaf.EMBEDDING_A))
    return head.tensors.keys() == {Leaf.A, Leaf.B} and all(
        other in embedding.tensors and mx.array_equal(head.tensors[own], embedding.tensors[other].T).item()
        for own, other in pairs
    )
