"""Decode steps of rows with adapters, by what the adapters of a batch are, against as many rows on the base.

Without a server around them, in one process, in turn. Each adapter is dealt to as many rows as there are
more rows than adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.adapters import ALL, ATTENTION, QV, AdapterKind
from benchmarks.case import Case, Column, Figure, Goal, Sample, Term
from benchmarks.library import AdapterSet
from benchmarks.sides import Side, SideKind, SideSpec
from benchmarks.sizes import Sizes

__all__ = ["Mixes", "case"]

_BASE = "base"
_TURNS = 3  # of each round
_GOALS = {"three ranks": 0.95, "nine layouts": 0.90, "LoRA with DoRA": 0.90, "with base rows": 0.95}
_FEW_ROWS = {8: 0.90, 1: 0.85}
_CPU_GOALS = {"three ranks": 0.92}


@dataclass(frozen=True, slots=True)
class Mixes:
    """Batches of `rows` rows by name, each with the ids of its adapters in turn; None is the base."""

    side: SideSpec
    rows: int
    steps: int
    mixes: tuple[tuple[str, tuple[str | None, ...]], ...]
    asked: None = None

    @property
    def name(self) -> str:
        """How many rows."""
        return f"decode steps of {self.rows} row{'s' * (self.rows > 1)}"

    async def prepare(self, side: Side) -> None:
        """Load the adapters, read the rows' prompts, and decode a step of each batch."""
        batches = {
            self._batch(mix): [
                None if (name := names[row % len(names)]) is None else str(side.root / name)
                for row in range(self.rows)
            ]
            for mix, names in self.mixes
        }
        await side.tell({"batches": batches})

    async def run(self, side: Side, round_index: int) -> Sample:
        """A few turns; the values are seconds of a step, by mix."""
        batches = [self._batch(mix) for mix, _ in self.mixes]
        found = await side.tell({"batches_of": batches, "steps": self.steps, "turns": _TURNS})
        return Sample({mix: tuple(found[self._batch(mix)]) for mix, _ in self.mixes})

    def _batch(self, mix: str) -> str:
        return f"{mix}, {self.rows}"


def case(sizes: Sizes) -> Case:
    """One layout, three ranks, nine layouts, LoRA with DoRA, and every second row on the base."""
    low_to_high, (_, middle, _) = sizes.mix_ranks, sizes.mix_ranks
    where = ALL if sizes.on_gpu else QV
    kinds: dict[str, list[AdapterKind]] = {
        "one layout": [AdapterKind(middle, where)],
        "three ranks": [AdapterKind(rank, where) for rank in low_to_high],
        "nine layouts": [AdapterKind(rank, each) for each in (QV, ATTENTION, ALL) for rank in low_to_high],
        "LoRA with DoRA": [AdapterKind(middle, where, dora) for dora in (False, True)],
    }
    counts: dict[AdapterKind, int] = {}
    mixes: dict[str, tuple[str | None, ...]] = {_BASE: (None,)}
    for mix, of_kinds in kinds.items():
        each = -(-sizes.mix_adapters // len(of_kinds))
        counts |= {kind: max(counts.get(kind, 0), each) for kind in of_kinds}
        ids = zip(*(AdapterSet(kind, each).ids for kind in of_kinds), strict=True)
        mixes[mix] = tuple(name for turn in ids for name in turn)[: sizes.mix_adapters]
    mixes["with base rows"] = tuple(one for name in mixes["one layout"] for one in (name, None))
    alone = {_BASE: mixes[_BASE], "LoRA": mixes["one layout"][:1], "DoRA": mixes["LoRA with DoRA"][1:2]}
    side = SideSpec(SideKind.DECODING, tuple(AdapterSet(kind, count) for kind, count in counts.items()))
    measures = tuple(
        Mixes(side, rows, sizes.mix_steps, tuple((mixes if rows > 1 else alone).items()))
        for rows in sizes.mix_rows
    )
    names = dict.fromkeys(mix for measure in measures for mix, _ in measure.mixes)
    return Case(
        name="mixes",
        about="Decode steps by the adapters of a batch, against as many base rows; no server around.",
        measures=measures,
        figures=tuple(_figure(measure, mix, sizes) for measure in measures for mix, _ in measure.mixes[1:]),
        columns=tuple(Column(f"{mix}, ms", mix, factor=1000, digits=2) for mix in names),
        round_seconds=8,
    )


def _figure(measure: Mixes, mix: str, sizes: Sizes) -> Figure:
    if sizes.on_gpu:
        bound = _GOALS.get(mix) if measure.rows > 8 else _FEW_ROWS.get(measure.rows)
    else:
        bound = _CPU_GOALS.get(mix)
    return Figure(
        f"decoding {measure.name.removeprefix('decode steps of ')}, {mix}, base ÷ mix",
        Term(measure, _BASE),
        Term(measure, mix),
        None if bound is None else Goal(bound, at_least=True),
    )
