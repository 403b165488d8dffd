"""Maps the factors of a PEFT file onto an MLX model: the place, the orientation and the scale of each.

What PEFT would do with the same folder and base is the reference: a module is adapted if the config targets
it and the file has its factors. Whatever is targeted and not in the file, or in the file and not targeted,
is a problem, and every problem is listed. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from ...config import CONFIG_FILE
from ...layers.module_weights import ModuleWeights
from ...layers.modules import ModuleKind, kind_of, no_dora, weight_shape
from ...layers.targets import named_base_modules
from ..protocol import Mapped
from .config import PeftConfig
from .experts import ExpertMapping, switch_block
from .factors import Contents, Factors, sort_tensors
from .heads import tied_embedding
from .module_factors import left_out, module_weights
from .names import HEADS, Leaf, is_head
from .parameters import old_layout, target_weight, transposed_weights
from .paths import any_layer, find_rule
from .routers import router_name, router_place
from .targets import all_linear, is_target, rank_and_scale
from .ties import TIED_NAMES, targets_are_tied
from .tokens import token_indices, token_weights
from .whole import WholeMapping

__all__ = ["map_onto"]

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
        self._config = config
        self._contents = contents
        self._tensors = tensors
        self._all_modules = dict(named_base_modules(model))
        self._modules = {path: module for path, module in self._all_modules.items() if kind_of(module)}
        self._tied = tied_embedding(self._modules)
        self._rule = find_rule((path for path, _ in contents.factors), self._exists)
        self._model_type = str(getattr(model, "model_type", None))
        self._experts = ExpertMapping(self._model_type, self._modules, self._rule, config)
        self._weights: dict[str, ModuleWeights] = {}
        self._problems = list(contents.problems)
        self._seen: set[str] = set()

    def result(self) -> Mapped:
        for factors in self._contents.factors.values():
            if self._at(factors.path) is not None or not self._experts.take(factors):
                self._take(factors)
        self._experts.finish()
        self._weights |= self._experts.weights
        self._problems += self._experts.problems
        self._find_missing()
        warnings = self._map_wholes()
        if not self._weights and not self._problems:
            self._problems.append("expected tensors of an adapter, the file has none")
        mx.eval([[one.lora_a, one.lora_b, one.magnitude, one.bias] for one in self._weights.values()])
        return Mapped(self._weights, self._problems, tuple(warnings))

    def _exists(self, path: str) -> bool:
        is_module = path in self._modules or router_place(self._modules, path) is not None
        return is_module or switch_block(self._modules, path) is not None

    def _at(self, name: str) -> str | None:
        """The path in the model of the transformers module `name`."""
        path = self._rule.to_mlx(name)
        if path is None or path in self._modules:
            return path
        return router_place(self._modules, path)

    def _take(self, factors: Factors) -> None:
        path = self._at(factors.path)
        if path is None and self._tied is not None and is_head(factors.path):
            self._take_tied_head(factors)
            return
        if path is None or factors.depth or kind_of(self._modules[path]) is ModuleKind.SWITCH:
            self._problems += factors.refused(f"the model has no module {factors.path} that can be adapted")
            return
        self._seen.add(path)
        module = self._modules[path]
        if Leaf.TOKENS in factors.tensors and (indices := token_indices(self._config, factors.path)):
            weights, problems = token_weights(self._config, factors, indices, module)
            self._weights |= {} if weights is None else {path: weights}
            self._problems += problems
            return
        is_embedding = kind_of(module) is ModuleKind.EMBEDDING
        weight = self._parameter(factors.path, module)
        problems = self._left_out(factors, module, weight)
        if self._config.fields.use_dora and (reason := no_dora(module)):
            problems += factors.refused(f"a {type(module).__name__} cannot have magnitudes: {reason}")
        if problems:
            self._problems += problems
            return
        weights, problems = module_weights(
            self._config, factors, is_embedding=is_embedding, shape=weight_shape(module), name=weight
        )
        self._problems += problems
        if weights is not None and is_embedding:
            weights = self._embedding(path, factors, weights)
        if weights is not None:
            self._weights[path] = weights

    def _left_out(self, factors: Factors, module: nn.Module, weight: str | None) -> list[str]:
        """Problems if the config adapts neither the module nor its `weight` as a parameter that is known."""
        if weight is None:
            return left_out(self._config, factors, is_linear=_is_linear(module))
        reason = old_layout(self._config) or transposed_weights(self._model_type)
        return [] if reason is None else factors.refused(reason)

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
        """With ensure_weight_tying, the head's factors are the embedding's own, transposed."""
        embeddings = [one for one in self._contents.factors.values() if self._at(one.path) == self._tied]
        is_tied = targets_are_tied(self._config.fields)
        shared = [one for one in embeddings if is_tied and _is_transposed(factors, one)]
        own = rank_and_scale(self._config, factors.path)
        if any(rank_and_scale(self._config, one.path) != own for one in shared):
            self._problems += factors.refused(_UNLIKE_HEAD)
        elif not shared:
            self._problems += factors.refused(
                "the model's head is tied to its embedding, so that it cannot have factors or rows of its "
                "own; train both with ensure_weight_tying, which PEFT heeds where target_modules name "
                f"{' or '.join(TIED_NAMES)}, or merge the adapter into its base"
            )

    def _map_wholes(self) -> Sequence[str]:
        """Map the weights of whole modules; returns warnings."""
        wholes = WholeMapping(self._all_modules, self._rule, self._config, self._weights)
        wholes.map(self._contents.wholes, self._tensors)
        self._weights |= wholes.weights
        self._problems += wholes.problems
        return wholes.warnings

    def _find_missing(self) -> None:
        """Modules that the config targets and the file has no factors for."""
        adapted = {any_layer(path) for path in self._seen}
        for path, module in self._modules.items():
            name = self._rule.to_peft(self._named(path))
            is_single = kind_of(module) is not ModuleKind.SWITCH
            if path in self._seen or name is None or not is_single:
                continue
            if not self._is_wanted(name, module):
                continue
            # What is a linear layer here need not be one in the model that was trained (a router's gate).
            if all_linear(self._config.fields) and any_layer(path) not in adapted:
                continue
            self._problems.append(
                f"module {name}: expected tensors, the file has none, though {CONFIG_FILE} targets it"
            )

    def _named(self, path: str) -> str:
        """`path` as a name that is looked for among the targets."""
        return router_name(self._modules, path) if self._config.fields.target_parameters else path

    def _is_wanted(self, name: str, module: nn.Module) -> bool:
        if self._is_target(name, module) or token_indices(self._config, name):
            return True
        return self._parameter(name, module) is not None

    def _is_target(self, name: str, module: nn.Module) -> bool:
        return is_target(self._config.fields, name, is_linear=_is_linear(module), is_head=is_head(name))


def _is_linear(module: nn.Module) -> bool:
    return kind_of(module) in (ModuleKind.LINEAR, ModuleKind.SPLIT)


def _is_transposed(head: Factors, embedding: Factors) -> bool:
    """Whether the head's A is the embedding's Bᵀ, and its B the embedding's Aᵀ."""
    pairs = ((Leaf.A, Leaf.EMBEDDING_B), (Leaf.B, Leaf.EMBEDDING_A))
    return head.tensors.keys() == {Leaf.A, Leaf.B} and all(
        other in embedding.tensors and mx.array_equal(head.tensors[own], embedding.tensors[other].T).item()
        for own, other in pairs
    )
