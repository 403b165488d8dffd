"""Several adapters and weights as one adapter: what each brings to a module, merged by one of five methods.

    linear       Σ w·s·B A, exactly: the factors one beside the other, of the sum of the ranks
    svd          the same sum, cut to a rank
    ties         arXiv:2306.01708 on the deltas s·B A, cut to a rank
    dare_linear  arXiv:2311.03099 on the deltas, summed, cut to a rank
    dare_ties    arXiv:2311.03099 on the deltas, then TIES' election and merge, cut to a rank

PEFT's `add_weighted_adapter` calls the first "cat", and the last three "ties_svd", "dare_linear_svd" and
"dare_ties_svd"; its "linear", "ties", "dare_linear" and "dare_ties" treat A and B apart, and the product of
two merged factors is not the merged product. Knows no model, names no folders. Pure; any thread.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import mlx.core as mx
import numpy as np

from ..config import MAX_RANK
from ..errors import InvalidBlendError
from ..layers.module_weights import ModuleWeights
from .deltas import DisjointMean, WeightedSum, drop, trim
from .ranks import LowRank, truncate_matrix, truncate_product
from .side_by_side import side_by_side

__all__ = [
    "MAX_PARTS",
    "Blend",
    "BlendMethod",
    "BlendOptions",
    "BlendPart",
    "BlendReport",
    "blend",
    "problem_of_dora",
    "problems_unread",
]

BlendMethod = Literal["linear", "svd", "ties", "dare_linear", "dare_ties"]
"""How the deltas of several adapters become one."""

MAX_PARTS = 32
_MAX_SEED = 2**63 - 1
_WITH_DENSITY = ("ties", "dare_linear", "dare_ties")
_WITH_SEED = ("dare_linear", "dare_ties")


@dataclass(frozen=True, slots=True)
class BlendPart:
    """An adapter in a blend: what it brings to each module by path, and its weight; `name` is for errors."""

    name: str
    weight: float
    modules: Mapping[str, ModuleWeights]


@dataclass(frozen=True, slots=True)
class BlendOptions:
    """How parts are blended.

    `density` is the share of a delta's entries that ties and dare keep, `rank` the most that a module of the
    result has (None: the largest of all parts), `seed` what dare draws from (None: 0).
    """

    method: BlendMethod = "linear"
    density: float | None = None
    rank: int | None = None
    seed: int | None = None

    def problems(self) -> list[str]:
        """What is wrong with them, a sentence each, which begins with the name of the field."""
        method, found = self.method, list[str]()
        if method not in get_args(BlendMethod):
            return [f"method: expected one of {', '.join(get_args(BlendMethod))}, got {method!r}"]
        if self.density is not None and method not in _WITH_DENSITY:
            found.append(f"density: {method} keeps every entry; only {', '.join(_WITH_DENSITY)} have one")
        elif method in _WITH_DENSITY and not (self.density is not None and 0 < self.density <= 1):
            given = "none was given" if self.density is None else f"got {self.density}"
            found.append(f"density: {method} needs a number above 0 and at most 1, {given}")
        if self.rank is not None and method == "linear":
            found.append(
                "rank: linear is exact, of the sum of the parts' ranks; svd cuts the same sum to a rank"
            )
        elif self.rank is not None and not 1 <= self.rank <= MAX_RANK:
            found.append(f"rank: expected a whole number from 1 to {MAX_RANK}, got {self.rank}")
        if self.seed is not None and method not in _WITH_SEED:
            found.append(f"seed: {method} draws nothing; only {', '.join(_WITH_SEED)} have one")
        elif self.seed is not None and not 0 <= self.seed <= _MAX_SEED:
            found.append(f"seed: expected a whole number from 0 to {_MAX_SEED}, got {self.seed}")
        return found


@dataclass(frozen=True, slots=True)
class BlendReport:
    """What the rank of a blend leaves out of the merged deltas, as ‖left out‖ / ‖delta‖ for each module.

    `rank` is the largest of all modules. For linear the errors are 0, and no module is the worst.
    """

    modules: int
    rank: int
    error_mean: float
    error_worst: float
    worst_module: str | None


@dataclass(frozen=True, slots=True)
class Blend:
    """A blend's modules by path, evaluated float32 factors of scale 1, and how well they hold it."""

    modules: dict[str, ModuleWeights]
    report: BlendReport


class _Term(NamedTuple):
    """What the `position`-th part brings to the module that is being blended."""

    position: int
    weight: float
    module: ModuleWeights


class _Merged(NamedTuple):
    """The factors of a blended module, and ‖left out‖ / ‖delta‖."""

    weights: ModuleWeights
    error: float

    @property
    def is_finite(self) -> bool:
        """Whether all of it is."""
        factors = (self.weights.lora_a, self.weights.lora_b, self.weights.bias)
        arrays = [factor for factor in factors if factor is not None]
        return math.isfinite(self.error) and all(bool(mx.isfinite(array).all().item()) for array in arrays)


def blend(parts: Sequence[BlendPart], options: BlendOptions) -> Blend:
    """The adapter that `parts` make together. A module that a part lacks is one that it does not change.

    Parts of weight 0 are left out. The same parts in the same order give the same result.

    Raises:
        InvalidBlendError: wrong options or weights, DoRA parts, parts that are not for the same model, or
            values that do not stay finite; everything is listed.
    """
    problems = problems_unread([(part.name, part.weight) for part in parts], options)
    used = [(at, part) for at, part in enumerate(parts) if part.weight != 0]
    problems += [problem for _, part in used for problem in _problems_of_part(part, options.method)]
    paths = sorted({path for _, part in used for path in part.modules})
    terms = {
        path: [_Term(at, part.weight, part.modules[path]) for at, part in used if path in part.modules]
        for path in paths
    }
    problems += [problem for path in paths for problem in _problems_of_module(path, terms[path], options)]
    if problems:
        raise InvalidBlendError(problems)
    largest = max(term.module.file_rank for path in paths for term in terms[path])
    with np.errstate(over="ignore", invalid="ignore"):  # looked for, and told by name
        merged = {path: _merge(path, terms[path], options, options.rank or largest) for path in paths}
    broken = [path for path, module in merged.items() if not module.is_finite]
    if broken:
        raise InvalidBlendError([f"{path}: the blended delta is not finite" for path in broken])
    errors = {path: module.error for path, module in merged.items()}
    worst = max(errors, key=lambda path: errors[path])
    report = BlendReport(
        modules=len(merged),
        rank=max(module.weights.file_rank for module in merged.values()),
        error_mean=math.fsum(errors.values()) / len(errors),
        error_worst=errors[worst],
        worst_module=worst if errors[worst] > 0 else None,
    )
    return Blend({path: module.weights for path, module in merged.items()}, report)


def problems_unread(terms: Sequence[tuple[str, float]], options: BlendOptions) -> list[str]:
    """What is wrong with a blend of (name, weight) terms whatever the adapters are, a sentence each."""
    return options.problems() + _problems_of_weights(terms)


def problem_of_dora(name: str) -> str:
    """Why a DoRA adapter called `name` cannot be blended."""
    return (
        f"blend: {name!r} is a DoRA adapter, whose magnitudes rescale the base: its effect is not a "
        "delta that could be added (arXiv:2402.09353)"
    )


def _problems_of_weights(terms: Sequence[tuple[str, float]]) -> list[str]:
    if not 1 <= len(terms) <= MAX_PARTS:
        return [f"blend: expected 1 to {MAX_PARTS} adapters, got {len(terms)}"]
    if all(weight == 0 for _, weight in terms):
        return ["blend: every weight is 0, so that nothing is left"]
    return [
        f"blend: expected finite weights, that of {name!r} is {weight}"
        for name, weight in terms
        if not math.isfinite(weight)
    ]


def _problems_of_part(part: BlendPart, method: BlendMethod) -> list[str]:
    modules = part.modules.values()
    problems = []
    if any(module.magnitude is not None for module in modules):
        problems.append(problem_of_dora(part.name))
    if method in _WITH_DENSITY and any(module.bias is not None for module in modules):
        problems.append(
            f"blend: {part.name!r} has biases, for which {method} is not defined; linear and svd are"
        )
    return problems


def _problems_of_module(path: str, terms: Sequence[_Term], options: BlendOptions) -> list[str]:
    shapes = {_outer_shape(term.module) for term in terms}
    if len(shapes) > 1:
        return [f"{path}: the adapters are not for one model: its shapes are {sorted(shapes)}"]
    if len({(term.module.lookup_only, term.module.head_only) for term in terms}) > 1:
        return [
            f"{path}: some of the adapters change the head that is tied to it, others do not, or not the "
            "look-up: no one can"
        ]
    rank = sum(term.module.file_rank for term in terms)
    if options.method == "linear" and rank > MAX_RANK:
        return [f"{path}: linear would have rank {rank}, of {MAX_RANK} allowed; svd cuts the sum to a rank"]
    return []


def _merge(path: str, terms: Sequence[_Term], options: BlendOptions, rank: int) -> _Merged:
    if options.method in ("linear", "svd"):
        whole = side_by_side([(term.module, term.weight) for term in terms])
        if options.method == "linear":
            return _Merged(whole, 0.0)
        found = [truncate_product(left, right, rank) for left, right in _scaled_factors(whole)]
        return _cut(whole, found)
    found = [truncate_matrix(delta, rank) for delta in _merged_deltas(path, terms, options)]
    return _cut(terms[0].module, found)


def _cut(module: ModuleWeights, found: Sequence[LowRank]) -> _Merged:
    """`module` with these factors; not finite as soon as one of its matrices is not."""
    if not all(math.isfinite(each.size) for each in found):
        return _Merged(module, math.nan)
    return _Merged(_with_factors(module, found), _relative_error(found))


def _merged_deltas(path: str, terms: Sequence[_Term], options: BlendOptions) -> Iterator[np.ndarray]:
    """The merged delta (n, m) of each matrix of a module: one, or one for each expert or output."""
    is_apart = all(term.module.parts for term in terms)
    modules = [term.module if is_apart else replace(term.module, parts=()) for term in terms]
    density = 1.0 if options.density is None else options.density
    for matrix, factors in enumerate(zip(*map(_scaled_factors, modules), strict=True)):
        shape = (factors[0][0].shape[0], factors[0][1].shape[1])
        merge = WeightedSum(shape) if options.method == "dare_linear" else DisjointMean(shape)
        for term, (left, right) in zip(terms, factors, strict=True):
            delta = left @ right
            if options.method == "ties":
                delta = trim(delta, density)
            else:
                delta = drop(delta, density, _generator(options.seed or 0, term.position, path, matrix))
            merge.add(delta, term.weight)
        yield merge.merged()


def _generator(seed: int, position: int, path: str, matrix: int) -> np.random.Generator:
    """Draws that depend on the seed, the part's place, the module and the expert, and on nothing else."""
    of_path = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.PCG64([seed, position, of_path, matrix]))


def _scaled_factors(module: ModuleWeights) -> list[tuple[np.ndarray, np.ndarray]]:
    """(n, r) and (r, m) of each matrix, float32, whose product is (s·B A)ᵀ, or s·B A of an expert."""
    pairs = [(np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32))) for a, b in module.pairs]
    if module.lora_a.ndim == 3:
        pairs = [(b, a) for experts in pairs for a, b in zip(*experts, strict=True)]
    return [(left, right * np.float32(module.scale)) for left, right in pairs]


def _with_factors(module: ModuleWeights, found: Sequence[LowRank]) -> ModuleWeights:
    """`module` with these factors, one pair for each of its matrices, at scale 1."""
    pairs = [(mx.array(each.left), mx.array(each.right)) for each in found]
    if module.lora_a.ndim == 3:
        b, a = (mx.stack(list(factors)) for factors in zip(*pairs, strict=True))
    elif len(pairs) > 1:
        module = ModuleWeights.of_parts(pairs, 1.0, module.bias)
        a, b = module.lora_a, module.lora_b
    else:
        (a, b), module = pairs[0], replace(module, parts=())
    mx.eval(a, b)
    return replace(module, lora_a=a, lora_b=b, scale=1.0)


def _outer_shape(module: ModuleWeights) -> tuple[int, ...]:
    """The shape of the module's delta, as its factors give it."""
    a, b = module.lora_a.shape, module.lora_b.shape
    return (a[0], b[1], a[2]) if len(a) == 3 else (a[0], b[1])


def _relative_error(found: Sequence[LowRank]) -> float:
    size = math.fsum(each.size for each in found)
    return math.sqrt(math.fsum(each.lost for each in found) / size) if size > 0 else 0.0
