"""How the factors of an adapter lie in memory: one row of numbers for each group of projections.

Projections that read the same input (query, key and value; gate and up) form a group, so that one matrix
product shrinks the input for all of them. For each group that it adapts, an adapter is one flat row,

    A of every projection, each (rank, in) | B of every projection, each (rank, out)
    | DoRA's factors, each (out,) | the adapter's biases, each (out,)

and adapters of the same layout lie in the same stacks. Ranks are rounded up to a few buckets, and the rows
in between are nought. Where each of a layer's experts has its own factors, A and B have one more axis in
front, (experts, rank, …). An embedding lies as the linear layer that it is for a head that is tied to it,
with the tokens as its outputs. Knows no model and no batch. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

__all__ = ["Factors", "GroupLayout", "Layout", "Projection", "bucket_rank", "group_projections"]

_FAMILIES = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("in_proj_qkvz", "in_proj_ba"),
)
_SMALLEST_RANK = 4


def bucket_rank(rank: int) -> int:
    """The rank that factors are padded to: multiples of 4 up to 32, of 8 to 64, of 16 to 128, and so on.

    Four buckets to an octave, so that near ranks share a stack and at most a quarter is padding beyond 4.
    """
    step = max(_SMALLEST_RANK, (1 << (rank.bit_length() - 1)) // 4)
    return -(-rank // step) * step


@dataclass(frozen=True, slots=True)
class Factors:
    """What an adapter brings to one projection: a (rank, in), b (rank, out), for DoRA factor (out,) or (in,).

    `bias` (out,) is the adapter's own; experts' a and b have the experts as their first axis.
    """

    a: mx.array
    b: mx.array
    factor: mx.array | None = None
    bias: mx.array | None = None


@dataclass(frozen=True, slots=True)
class Projection:
    """One adapted linear layer: its path, its rank after padding, and its sizes."""

    path: str
    rank: int
    in_size: int
    out_size: int


@dataclass(frozen=True)
class GroupLayout:
    """The row of a group: its projections in order, and the dtype of all its numbers.

    `experts` is how many there are, each with factors of its own; None for layers that have none. With
    `lookup_only`, an embedding's factors are for look-ups and not for the head that is tied to it, with
    `head_only` the other way round. With
    `by_feature`, its DoRA's factor is (in,), one for each feature.
    """

    projections: tuple[Projection, ...]
    is_dora: bool
    dtype: mx.Dtype
    experts: int | None = None
    has_bias: bool = False
    lookup_only: bool = False
    by_feature: bool = False
    head_only: bool = False

    @property
    def in_size(self) -> int:
        """The size of the input that the projections share."""
        return self.projections[0].in_size

    @property
    def weighs_last(self) -> bool:
        """Whether weights come after B, in float32, as mlx-lm's scale does: float16 may not hold w·A x."""
        return self.dtype == mx.float16

    @cached_property
    def rank(self) -> int:
        """The ranks of all projections together."""
        return sum(projection.rank for projection in self.projections)

    @cached_property
    def ranks(self) -> dict[str, slice]:
        """By path, the projection's own rows of the stacked A."""
        return dict(self._slices((p.path, p.rank) for p in self.projections))

    @cached_property
    def splits(self) -> list[int]:
        """Where the rows of A divide between the projections."""
        return [ranks.start for ranks in self.ranks.values()][1:]

    @cached_property
    def matrices(self) -> int:
        """How many matrices A and B are each: as many as there are experts, or one."""
        return 1 if self.experts is None else self.experts

    @cached_property
    def a(self) -> slice:
        """Where in the row A of all projections lies."""
        return slice(0, self.matrices * self.rank * self.in_size)

    @cached_property
    def b(self) -> dict[str, slice]:
        """By path, where in the row the projection's B lies."""
        sizes = ((p.path, self.matrices * p.rank * p.out_size) for p in self.projections)
        return dict(self._slices(sizes, self.a.stop))

    @cached_property
    def factors(self) -> dict[str, slice]:
        """By path, where in the row DoRA's factor lies."""
        after_b = max(found.stop for found in self.b.values())
        sizes = ((p.path, p.in_size if self.by_feature else p.out_size) for p in self.projections)
        return dict(self._slices(sizes, after_b))

    @cached_property
    def biases(self) -> dict[str, slice]:
        """By path, where in the row the adapter's own bias lies."""
        before = self.factors if self.is_dora else self.b
        start = max(found.stop for found in before.values())
        return dict(self._slices(((p.path, p.out_size) for p in self.projections), start))

    @cached_property
    def size(self) -> int:
        """Numbers in a row."""
        last = self.biases if self.has_bias else self.factors if self.is_dora else self.b
        return max(found.stop for found in last.values())

    def place_of(self, path: str) -> str:
        """Where the wrapper hangs that serves the projection at `path`: for experts, their common module."""
        return path if self.experts is None else path.rpartition(".")[0]

    def pack(self, factors: Mapping[str, Factors]) -> mx.array:
        """The row (size,) that holds `factors`, by path; not yet evaluated."""
        parts = [factors[p.path] for p in self.projections]
        padded = list(zip(parts, self.projections, strict=True))
        # One after the other by rows, so that the A of all projections is one matrix, for each expert.
        arrays = [mx.concatenate([_pad(part.a, p.rank) for part, p in padded], axis=-2)]
        arrays += [_pad(part.b, p.rank) for part, p in padded]
        arrays += [part.factor for part in parts if part.factor is not None]
        if self.has_bias:
            arrays += [mx.zeros(p.out_size) if part.bias is None else part.bias for part, p in padded]
        return mx.concatenate([array.astype(self.dtype).reshape(-1) for array in arrays])

    def _slices(self, sizes: Iterable[tuple[str, int]], start: int = 0) -> Iterable[tuple[str, slice]]:
        for path, size in sizes:
            yield path, slice(start, start + size)
            start += size


class Layout:
    """What adapters have in common that can lie in the same stacks: the same groups with the same rows.

    Compared by identity, since it is looked up in every forward; whoever makes one keeps it for its equals.
    """

    __slots__ = ("groups",)

    def __init__(self, groups: Mapping[str, GroupLayout]) -> None:
        self.groups = dict(groups)

    @property
    def places(self) -> set[str]:
        """Where the wrappers of all projections hang in the model."""
        return {group.place_of(path) for group in self.groups.values() for path in group.ranks}


def group_projections(in_sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """The paths in `in_sizes` (path → input size) by group; a group's name says whose input it is.

    That the projections of a family share their input is what their names say; it is checked in each forward.
    """
    groups: dict[str, list[str]] = {}
    for path, size in in_sizes.items():
        parent, _, name = path.rpartition(".")
        family = next((family for family in _FAMILIES if name in family), None)
        group = path if family is None else f"{parent}.{'+'.join(family)}[{size}]"
        groups.setdefault(group, []).append(path)
    return {group: sorted(paths, key=_place) for group, paths in groups.items()}


def _place(path: str) -> tuple[int, str]:
    name = path.rpartition(".")[2]
    return next((family.index(name) for family in _FAMILIES if name in family), 0), path


def _pad(array: mx.array, rank: int) -> mx.array:
    missing = rank - array.shape[-2]
    return mx.pad(array, [*[(0, 0)] * (array.ndim - 2), (0, missing), (0, 0)]) if missing else array
