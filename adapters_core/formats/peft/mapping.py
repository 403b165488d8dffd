"""Maps the factors of a PEFT file onto an MLX model: the place, the orientation and the scale of each.

What PEFT would do with the same folder and base is the reference: a module is adapted if the config targets
it and the file has its factors. Whatever is targeted and not in the file, or in the file and not targeted,
is a problem, and every problem is listed. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from ...config import CONFIG_FILE
from ...layers.module_weights import ModuleWeights
from ...layers.modules import ModuleKind, kind_of, no_dora, weight_shape
from ...layers.targets import named_base_modules
from ..protocol import Mapped
from .config import PeftConfig
from .copies import copy_problem
from .experts import ExpertMapping, switch_block
from .factors import Contents, Factors, sort_tensors
from .names import HEADS, Leaf, is_head, is_input_embedding
from .paths import any_layer, find_rule
from .targets import all_linear, is_target, rank_and_scale
from .tokens import token_indices, token_weights

__all__ = ["map_onto"]

Tensors = Mapping[str, mx.array]

_TARGETING = (
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "layers_to_transform",
    "layers_pattern",
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
        self._modules = {path: module for path, module in named_base_modules(model) if kind_of(module)}
        self._rule = find_rule((path for path, _ in contents.factors), self._exists)
        model_type = str(getattr(model, "model_type", None))
        self._experts = ExpertMapping(model_type, self._modules, self._rule, config)
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
        self._check_copies()
        if not self._weights and not self._problems:
            self._problems.append("expected tensors of an adapter, the file has none")
        mx.eval([[one.lora_a, one.lora_b, one.magnitude, one.bias] for one in self._weights.values()])
        return Mapped(self._weights, self._problems)

    def _exists(self, path: str) -> bool:
        return path in self._modules or switch_block(self._modules, path) is not None

    def _at(self, name: str) -> str | None:
        """The path in the model of the transformers module `name`."""
        path = self._rule.to_mlx(name)
        return path if path in self._modules else None

    def _take(self, factors: Factors) -> None:
        path = self._at(factors.path)
        if path is None and self._head_is_tied and is_head(factors.path):
            self._take_tied_head(factors)
            return
        if path is None or factors.depth:
            self._problems += factors.refused(f"the model has no module {factors.path} that can be adapted")
            return
        self._seen.add(path)
        module = self._modules[path]
        if Leaf.TOKENS in factors.tensors and (indices := token_indices(self._config, factors.path)):
            weights, problems = token_weights(factors, indices, module)
            self._weights |= {} if weights is None else {path: weights}
            self._problems += problems
            return
        if not self._is_target(factors.path, module):
            self._problems += factors.refused(self._leaves_out(factors.path))
            return
        is_embedding = kind_of(module) is ModuleKind.EMBEDDING
        weights = self._embedding(factors, module) if is_embedding else self._linear(factors, module)
        if weights is not None:
            self._weights[path] = weights

    def _linear(self, factors: Factors, module: nn.Module) -> ModuleWeights | None:
        rank, scale = rank_and_scale(self._config, factors.path)
        rows, columns = weight_shape(module)
        expected: dict[Leaf, tuple[int, ...]] = {Leaf.A: (rank, columns), Leaf.B: (rows, rank)}
        if self._config.fields.use_dora:
            if reason := no_dora(module):
                self._problems += factors.refused(
                    f"a {type(module).__name__} cannot have magnitudes: {reason}"
                )
                return None
            expected[Leaf.MAGNITUDE] = (rows,)
        if self._config.fields.lora_bias:
            expected[Leaf.BIAS] = (rows,)
        if problems := factors.problems(expected, rank):
            self._problems += problems
            return None
        tensors = factors.tensors
        return ModuleWeights(
            mx.contiguous(tensors[Leaf.A].T),
            mx.contiguous(tensors[Leaf.B].T),
            tensors.get(Leaf.MAGNITUDE),
            scale,
            tensors.get(Leaf.BIAS),
        )

    def _embedding(self, factors: Factors, module: nn.Module) -> ModuleWeights | None:
        rank, scale = rank_and_scale(self._config, factors.path)
        count, dims = weight_shape(module)
        reason = None
        if self._config.fields.use_dora:
            reason = "PEFT's DoRA of an embedding has a magnitude for each feature, which no layer here has"
        elif self._config.fields.lora_bias:
            reason = "lora_bias of an embedding is not supported"
        elif self._is_tied_otherwise(factors.path):
            reason = "the head that is tied to this embedding has another rank or scale than it"
        expected = {Leaf.EMBEDDING_A: (rank, count), Leaf.EMBEDDING_B: (dims, rank)}
        if problems := factors.refused(reason) if reason else factors.problems(expected, rank):
            self._problems += problems
            return None
        lora_a = mx.contiguous(factors.tensors[Leaf.EMBEDDING_A].T)
        lora_b = mx.contiguous(factors.tensors[Leaf.EMBEDDING_B].T)
        # To PEFT, a tied head is a linear layer that shares the weight and not the adapter.
        lookup_only = self._head_is_tied and not self._config.fields.ensure_weight_tying
        return ModuleWeights(lora_a, lora_b, None, scale, lookup_only=lookup_only)

    def _is_tied_otherwise(self, embedding: str) -> bool:
        """Whether ensure_weight_tying gives head and embedding the same factors and not the same scale."""
        ranks_and_scales = {rank_and_scale(self._config, name) for name in (HEADS[0], embedding)}
        is_tied = self._head_is_tied and bool(self._config.fields.ensure_weight_tying)
        return is_tied and len(ranks_and_scales) > 1

    @property
    def _head_is_tied(self) -> bool:
        return not any(is_head(path) for path in self._modules)

    def _take_tied_head(self, factors: Factors) -> None:
        """With ensure_weight_tying, the head's factors are the embedding's own, transposed."""
        embeddings = [one for one in self._contents.factors.values() if Leaf.EMBEDDING_A in one.tensors]
        is_tied = bool(self._config.fields.ensure_weight_tying) and any(
            _is_transposed(factors, one)
            and rank_and_scale(self._config, factors.path) == rank_and_scale(self._config, one.path)
            for one in embeddings
        )
        if not is_tied:
            self._problems += factors.refused(
                "the model's head is tied to its embedding, so that it cannot have factors of its own"
            )

    def _check_copies(self) -> None:
        for name, path in self._contents.base_copies.items():
            module = self._modules.get(self._at(path) or "")
            if module is None and self._head_is_tied and is_head(path):
                module = self._tied_embedding()
            if problem := copy_problem(name, self._tensors[name], module):
                self._problems.append(problem)

    def _tied_embedding(self) -> nn.Module | None:
        return next(
            (
                module
                for path, module in self._modules.items()
                if is_input_embedding(path) and kind_of(module) is ModuleKind.EMBEDDING
            ),
            None,
        )

    def _find_missing(self) -> None:
        """Modules that the config targets and the file has no factors for."""
        adapted = {any_layer(path) for path in self._seen}
        for path, module in self._modules.items():
            name = self._rule.to_peft(path)
            is_single = kind_of(module) is not ModuleKind.SWITCH
            if path in self._seen or name is None or not is_single:
                continue
            if not self._is_target(name, module) and not token_indices(self._config, name):
                continue
            # What is a linear layer here need not be one in the model that was trained (a router's gate).
            if all_linear(self._config.fields) and any_layer(path) not in adapted:
                continue
            self._problems.append(
                f"module {name}: expected tensors, the file has none, though {CONFIG_FILE} targets it"
            )

    def _is_target(self, name: str, module: nn.Module) -> bool:
        is_linear = kind_of(module) in (ModuleKind.LINEAR, ModuleKind.SPLIT)
        return is_target(self._config.fields, name, is_linear=is_linear, is_head=is_head(name))

    def _leaves_out(self, name: str) -> str:
        return f"{CONFIG_FILE} leaves module {name} out ({_targeting(self._config)})"


def _targeting(config: PeftConfig) -> str:
    values = {name: getattr(config.fields, name) for name in _TARGETING}
    shown = ", ".join(f"{name} {value!r}" for name, value in values.items() if value)
    return shown if len(shown) <= 200 else f"{shown[:197]}..."


def _is_transposed(head: Factors, embedding: Factors) -> bool:
    """Whether the head's A is the embedding's Bᵀ, and its B the embedding's Aᵀ."""
    pairs = ((Leaf.A, Leaf.EMBEDDING_B), (Leaf.B, Leaf.EMBEDDING_A))
    return head.tensors.keys() == {Leaf.A, Leaf.B} and all(
        other in embedding.tensors and mx.array_equal(head.tensors[own], embedding.tensors[other].T).item()
        for own, other in pairs
    )
