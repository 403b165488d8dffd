"""An adapter's files by themselves, before any model has said where their tensors belong.

Modules have the names that the files give them. What no file says (whether a module is an embedding in
mlx-lm's format, how the experts of a PEFT file lie) stays open. Does not import mlx-lm, which takes seconds.
Runs on any thread.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from ..config import AdapterConfig, FineTuneType
from ..errors import InvalidAdapterError
from ..layers.module_weights import ModuleWeights
from ..open_folder import OpenFolder, opened
from ..report import Part, parts_of
from .causes import causes_of_names
from .peft.config import PeftConfig
from .peft.factors import Factors, sort_tensors
from .peft.module_factors import has_embedding_factors, left_out, module_weights
from .peft.names import HEADS, Leaf, is_head
from .peft.parameters import target_weight
from .peft.targets import rank_and_scale
from .peft.ties import targets_are_tied
from .reading import read_files
from .tensor_names import LEAVES, is_leaf, part_problems, split_name, weights_of, with_todays_shapes

__all__ = ["Unplaced", "read_unplaced"]

_IN_A_LAYER = re.compile(r"(^|\.)\d+\.")
_TIED_OR_NOT = "it depends on the model whether head and embedding are one"
_EXPERTS = re.compile(r"\.experts(\.\d+\.|$)")


@dataclass(frozen=True, slots=True)
class Unplaced:
    """An adapter as its files alone describe it.

    `weights` are the modules whose every tensor has a sure meaning, by the file's path; `open` says of each
    of the others why a model is needed; `parts` are both. `warnings` are sentences for the report.
    """

    format: str
    type: FineTuneType
    base_name: str | None
    ignored_fields: tuple[str, ...]
    dropout: float
    size_bytes: int
    weights: dict[str, ModuleWeights] = field(default_factory=dict)
    open: dict[str, str] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def digest(self) -> None:
        """What the adapter computes has no digest before a model has placed it."""
        return None


def read_unplaced(directory: str | Path | OpenFolder, scale: float | None = None) -> Unplaced:
    """Read the folder `directory`; `scale` stands in place of that in a config in mlx-lm's format.

    Raises:
        InvalidAdapterError: naming the folder and every problem that can be seen without a model.
        FolderChangedError: somebody wrote it meanwhile.
    """
    with opened(directory) as folder:
        config, weights = read_files(folder, scale=scale)
    is_peft = isinstance(config, PeftConfig)
    found = _from_peft(config, weights.tensors) if is_peft else _from_mlx(config, weights.tensors)
    if found.problems:
        causes = causes_of_names(weights.tensors.keys(), is_peft=is_peft)
        raise InvalidAdapterError(folder.name, found.problems, causes)
    return Unplaced(
        format="peft" if is_peft else "mlx",
        type=config.type if is_peft else config.fine_tune_type,
        base_name=(config.fields.base_model_name_or_path or None) if is_peft else config.base_name,
        ignored_fields=config.ignored if is_peft else config.ignored_fields,
        dropout=config.fields.lora_dropout if is_peft else config.lora_parameters.dropout,
        size_bytes=weights.size_bytes,
        weights=found.sure,
        open=found.open,
        parts=parts_of(found.sure) | found.parts,
        warnings=(*config.notes, *weights.notes),
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """Modules by path: those that are sure, why the others are open, what is known of these, and problems."""

    sure: dict[str, ModuleWeights] = field(default_factory=dict)
    open: dict[str, str] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, path: str, weights: ModuleWeights, doubt: str | None) -> None:
        """Keep a module that is whole; `doubt` is why only a model can tell what it is."""
        if doubt is None:
            self.sure[path] = weights
        else:
            self.open[path] = doubt
            self.parts.update(parts_of({path: weights}))


def _from_mlx(config: AdapterConfig, tensors: Mapping[str, mx.array]) -> _Found:
    found = _Found()
    modules: dict[str, dict[str, mx.array]] = defaultdict(dict)
    for name, tensor in sorted(with_todays_shapes(tensors).items()):
        path, leaf = split_name(name)
        if is_leaf(leaf):
            modules[path][leaf] = tensor
        else:
            found.problems.append(
                f"tensor {name}: not expected: not the name of an adapter's tensor ({', '.join(LEAVES)})"
            )
    parameters = config.lora_parameters
    for path, leaves in modules.items():
        problems = _mlx_problems(path, leaves, parameters.rank, config.fine_tune_type is FineTuneType.DORA)
        found.problems.extend(problems)
        if not problems:
            weights = weights_of(leaves, parameters.scale)
            is_sure = weights.lora_a.ndim == 3 or _IN_A_LAYER.search(path) or is_head(path)
            found.add(
                path, weights, None if is_sure else "the format does not say whether it is an embedding"
            )
    return found


def _mlx_problems(path: str, leaves: Mapping[str, mx.array], rank: int, is_dora: bool) -> list[str]:
    if any("." in leaf for leaf in leaves):
        return part_problems(path, leaves, rank)
    problems = [
        f"tensor {path}.{leaf}: the file has none of this name, but others of this module"
        for leaf in (LEAVES if is_dora else LEAVES[:2])
        if leaf not in leaves
    ]
    if "m" in leaves and not is_dora:
        problems.append(
            f"tensor {path}.m: not expected: a magnitude, but fine_tune_type is lora (dora has magnitudes)"
        )
    if problems:
        return problems
    a, b = leaves["lora_a"].shape, leaves["lora_b"].shape
    ranks = {2: lambda: (a[1], b[0]), 3: lambda: (a[1], b[2])}.get(len(a))
    if len(a) != len(b) or ranks is None or ranks() != (rank, rank) or (len(a) == 3 and a[0] != b[0]):
        problems.append(f"module {path}: expected factors of rank {rank}, got lora_a {a} and lora_b {b}")
    elif is_dora and leaves["m"].shape not in ((b[-1],), (a[0],)):
        problems.append(f"tensor {path}.m: expected shape {(b[-1],)}, got {leaves['m'].shape}")
    return problems


def _from_peft(config: PeftConfig, tensors: Mapping[str, mx.array]) -> _Found:
    contents = sort_tensors(tensors)
    found = _Found(problems=list(contents.problems))
    found.open.update(
        (name, "a weight of the base, which only the base can tell from a trained one")
        for name in contents.wholes
    )
    for (path, depth), factors in contents.factors.items():
        rank, scale = rank_and_scale(config, path)
        if Leaf.TOKENS in factors.tensors:
            rows = factors.tensors[Leaf.TOKENS]
            if rows.ndim != 2:
                found.problems.append(
                    f"tensor {factors.names[Leaf.TOKENS]}: expected a matrix, got {rows.shape}"
                )
                continue
            found.open[path] = "the rows of trained tokens are seen beside those of the base"
            found.parts[path] = _part_of(factors, rows.shape[0], 1.0)
            continue
        if depth or _EXPERTS.search(path):
            key = f"{path}.{depth}.experts" if depth else path
            found.open[path] = "how experts lie depends on the model"
            found.parts[key] = _part_of(factors, rank, scale)
            continue
        is_embedding = has_embedding_factors(factors)
        weight = target_weight(config, path)
        if weight is not None and left_out(config, factors, is_linear=True):
            found.open[path] = "where the module of a parameter lies depends on the model"
            found.parts[path] = _part_of(factors, *rank_and_scale(config, weight))
            continue
        if is_head(path) and targets_are_tied(config.fields) and Leaf.A in factors.tensors:
            # Where it is tied, its factors are the embedding's, whatever rank its own name has.
            found.open[path] = _TIED_OR_NOT
            found.parts[path] = _part_of(factors, factors.tensors[Leaf.A].shape[0], scale)
            continue
        problems = left_out(config, factors, is_linear=not is_embedding)
        weights = None
        if not problems:
            weights, problems = module_weights(config, factors, is_embedding=is_embedding)
        found.problems.extend(problems)
        if weights is not None:
            found.add(path, weights, _peft_doubt(path, is_embedding))
    return found


def _peft_doubt(path: str, is_embedding: bool) -> str | None:
    if is_embedding:
        return _TIED_OR_NOT
    if path.startswith("model.layers.") or path in HEADS:
        return None
    return "modules of such names lie elsewhere in MLX models"


def _part_of(factors: Factors, rank: int, scale: float) -> Part:
    """What is known of factors whose layout is open."""
    b = factors.tensors.get(Leaf.B)
    return Part(
        rank=rank,
        scale=scale,
        dtypes=frozenset(str(tensor.dtype).rpartition(".")[2] for tensor in factors.tensors.values()),
        is_silent=scale == 0 or (b is not None and not mx.any(b).item()),
        kind=None,
    )
