"""Where mlx-lm puts a weight of a transformers model on loading, and what it makes of it.

mlx-lm renames, scales, splits, joins and permutes weights in each model's `sanitize`, and a PEFT file goes
with the weights before that. So `sanitize` runs here on marked tensors of a few columns. What comes out says
which rows came from where, and times what; all else is a reason to refuse. Changes nothing; runs on any
thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .sanitizing import Weights, checkpoint_of, sanitized

__all__ = ["Arrival", "Arrivals", "arrivals"]

# A row of a marked matrix: one, the number of the tensor, the number of the row, noise; all times a constant.
_CONSTANTS = (1.0, 3.0)
_COLUMNS = 4
_TOLERANCE = 1e-5
_CHANGED = "mlx-lm changes it on loading in a way that factors cannot follow"
_DIFFERS = "what mlx-lm makes of it on loading depends on what else the checkpoint has"
_LEFT_OUT = "mlx-lm leaves it out on loading"


@dataclass(frozen=True, slots=True)
class Arrival:
    """Rows of a transformers weight in the parameter at `path` of the MLX model.

    Rows `start`, `start` + 1, … there are `factors`[i] · old[`rows`[i]]; None is all rows in order, and 1.
    `added` is what is added to each number of a vector. `index` is that of a matrix in a stack.
    `is_transposed` if the matrix is turned on the way. `is_part` if others have rows of the parameter too.
    """

    path: str
    start: int = 0
    rows: np.ndarray | None = None
    factors: np.ndarray | None = None
    added: float = 0.0
    index: int | None = None
    is_transposed: bool = False
    is_part: bool = False

    @property
    def module(self) -> str:
        """The path of the parameter's module."""
        return self.path.rpartition(".")[0]

    @property
    def is_plain(self) -> bool:
        """Whether factors of the weight before loading are factors of the parameter, if that is all of it."""
        changes = (self.rows, self.index, self.factors)
        return not self.is_part and not self.added and all(change is None for change in changes)

    def same(self, other: Arrival) -> bool:
        """Whether the two say the same."""
        flat = attrgetter("path", "start", "added", "index", "is_transposed")
        pairs = ((self.rows, other.rows), (self.factors, other.factors))
        return flat(self) == flat(other) and all(
            left is right or (left is not None and right is not None and np.array_equal(left, right))
            for left, right in pairs
        )


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Where each of some weights arrives, by its name; `reasons` has those of which that is not known."""

    found: dict[str, tuple[Arrival, ...]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


_Found = dict[str, tuple[Arrival, ...]]


def arrivals(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> Arrivals:
    """Where the weights of these names and shapes arrive in `model`; of a matrix, the rows alone matter.

    Seen twice: with these weights alone and what `sanitize` asks for, and beside the rest of a checkpoint.
    """
    if not hasattr(model, "sanitize") or not shapes:
        return Arrivals({name: (Arrival(name),) for name in shapes})
    checkpoint = checkpoint_of(model)
    markers = _markers(shapes, _CONSTANTS[0])
    mx.eval(markers)
    seen: list[_Found] = []
    unread: set[str] = set()
    reason = _LEFT_OUT
    for rest in ({}, checkpoint):
        try:
            found, unknown = _seen(model, shapes, markers, rest, checkpoint)
        except Exception as error:  # a `sanitize` raises what it likes on what it cannot use
            reason = f"mlx-lm's loading of it cannot be followed ({type(error).__name__}: {error})"
            continue
        seen.append(found)
        unread |= unknown
    result = Arrivals()
    for name in shapes:
        places = [found[name] for found in seen if name in found]
        # A run that finds no place in the model for a weight says nothing of it.
        places = [own for own in places if all(one.path in checkpoint for one in own)] or places[:1]
        if name in unread:
            result.reasons[name] = _CHANGED
        elif not places:
            result.reasons[name] = _LEFT_OUT if seen else reason
        elif any(not _same(places[0], other) for other in places[1:]):
            result.reasons[name] = _DIFFERS
        else:
            result.found[name] = places[0]
    return result


def _seen(
    model: nn.Module,
    shapes: Mapping[str, Sequence[int]],
    markers: Weights,
    rest: Weights,
    checkpoint: Weights,
) -> tuple[_Found, set[str]]:
    """Where each weight arrives beside the `rest`, and the weights that do not arrive whole in a known form.

    Raises:
        Exception: what `sanitize` raises.
    """
    first = sanitized(model, markers, rest, checkpoint)
    same = {
        path: mx.array_equal(tensor, markers[marker])
        for path, (tensor, marker) in first.items()
        if marker is not None and tensor.shape == markers[marker].shape
    }
    mx.eval(same)
    plain = {path for path, is_same in same.items() if is_same.item()}
    found: dict[str, list[Arrival]] = defaultdict(list)
    for path in plain:
        found[first[path][1] or ""].append(Arrival(path))
    others = {path: made for path, made in first.items() if path not in plain}
    if others:
        sets = [markers, _markers(shapes, _CONSTANTS[1])]
        second = sanitized(model, sets[1], rest, checkpoint)
        for path, (tensor, marker) in others.items():
            pair = tensor, second.get(path, (tensor, None))[0]
            origin = path if path in markers else marker
            if tensor.ndim > 1:
                for name, arrival in _pieces(path, pair, sets):
                    found[name].append(arrival)
            elif origin is not None and (added := _added([one[origin] for one in sets], pair)) is not None:
                found[origin].append(Arrival(path, added=added))
    own = {name: _without_copies(name, places) for name, places in found.items()}
    whole = {name for name, places in own.items() if _is_complete(places, shapes[name][0])}
    touched = {path for path in others if path in markers}
    touched |= {marker for _, marker in others.values() if marker is not None}
    return {name: own[name] for name in whole}, (own.keys() | touched) - whole


def _markers(shapes: Mapping[str, Sequence[int]], constant: float) -> Weights:
    tables: dict[int, mx.array] = {}
    markers: Weights = {}
    rng = np.random.default_rng(int(constant))
    for number, (name, (rows, *columns)) in enumerate(shapes.items(), 1):
        if not columns:
            markers[name] = mx.array(constant * rng.normal(size=rows).astype(np.float32))
            continue
        if rows not in tables:
            ones = np.ones(rows)
            table = np.stack([ones, 0 * ones, np.arange(rows), rng.normal(size=rows)], axis=1)
            tables[rows] = mx.array(constant * table.astype(np.float32))
        markers[name] = tables[rows] + mx.array([0, constant * number, 0, 0])
    return markers


def _pieces(
    path: str, pair: tuple[mx.array, mx.array], sets: Sequence[Weights]
) -> Iterator[tuple[str, Arrival]]:
    """The rows of markers in the matrix, or stack of matrices, that came out at `path`, run by run."""
    width = _COLUMNS if pair[0].shape[-1] == _COLUMNS else pair[0].shape[-2]
    if width != _COLUMNS or pair[0].ndim > 3 or pair[0].shape != pair[1].shape:
        return
    arrays = [np.array(tensor) for tensor in pair]
    for is_transposed in (False, True):
        turned = [array.swapaxes(-1, -2) if is_transposed else array for array in arrays]
        if turned[0].shape[-1] != _COLUMNS:
            continue
        stacks = [array if array.ndim == 3 else array[None] for array in turned]
        for index, matrices in enumerate(zip(*stacks, strict=True)):
            at = index if turned[0].ndim == 3 else None
            for name, start, rows, factors in _runs(matrices, sets):
                everything = np.arange(sets[0][name].shape[0])
                yield (
                    name,
                    Arrival(
                        path,
                        start,
                        None if np.array_equal(rows, everything) else rows,
                        None if (factors == 1).all() else factors,
                        index=at,
                        is_transposed=is_transposed,
                        is_part=len(rows) < len(matrices[0]),
                    ),
                )


def _runs(
    matrices: Sequence[np.ndarray], sets: Sequence[Weights]
) -> Iterator[tuple[str, int, np.ndarray, np.ndarray]]:
    """Rows that follow each other and come from one marker: its name, the first, their rows and factors."""
    names = [*sets[0]]
    factors = [matrix[:, 0] / constant for matrix, constant in zip(matrices, _CONSTANTS, strict=True)]
    with np.errstate(all="ignore"):
        numbers, rows = (np.nan_to_num(np.rint(matrices[0][:, at] / matrices[0][:, 0])) for at in (1, 2))
    is_linear = np.isclose(factors[0], factors[1], rtol=_TOLERANCE) & (factors[0] != 0)
    numbers = np.where(is_linear & (numbers >= 1) & (numbers <= len(names)), numbers, 0).astype(np.int64)
    ends = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    for start, end in pairwise(ends):
        if not numbers[start]:
            continue
        name, part = names[numbers[start] - 1], slice(start, end)
        own = rows[part].astype(np.int64)
        if own.min() < 0 or own.max() >= sets[0][name].shape[0]:
            continue
        expected = (np.array(one[name])[own] * factors[0][part, None] for one in sets)
        pairs = zip(matrices, expected, strict=True)
        if all(np.allclose(matrix[part], wanted, rtol=_TOLERANCE) for matrix, wanted in pairs):
            yield name, start, own, factors[0][part].copy()


def _added(markers: Sequence[mx.array], pair: tuple[mx.array, mx.array]) -> float | None:
    """What is added to each number of a vector, if that is all that happens to it."""
    if pair[0].shape != markers[0].shape:
        return None
    added = [np.array(after) - np.array(before) for before, after in zip(markers, pair, strict=True)]
    value = float(np.rint(added[0][0]))
    return value if all(np.allclose(one, value, atol=_TOLERANCE) for one in added) else None


def _is_complete(places: Sequence[Arrival], rows: int) -> bool:
    """Whether each row is in one place, and in no other."""
    if len(places) == 1 and places[0].rows is None:
        return True
    everything = np.arange(rows)
    found = np.concatenate([everything if one.rows is None else one.rows for one in places])
    return np.array_equal(np.sort(found), everything)


def _without_copies(name: str, places: Sequence[Arrival]) -> tuple[Arrival, ...]:
    """`places` without a second one of the whole weight, as a tied head has it in some models."""
    if len(places) > 1 and all(one.is_plain for one in places):
        return tuple(one for one in places if one.path == name) or (places[0],)
    return tuple(sorted(places, key=lambda one: (one.path, one.index or 0, one.start)))


def _same(left: Sequence[Arrival], right: Sequence[Arrival]) -> bool:
    return len(left) == len(right) and all(own.same(other) for own, other in zip(left, right, strict=True))
