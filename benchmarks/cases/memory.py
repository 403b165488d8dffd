"""What resident adapters take, against the tensors in their files: as the server counts, and the system."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.adapters import RANK_8_QV, RANK_16_ALL
from benchmarks.case import Case, Column, Figure, Goal, Sample, Term
from benchmarks.library import AdapterSet, tensor_bytes
from benchmarks.sides import Side, SideKind, SideSpec
from benchmarks.sizes import Sizes

__all__ = ["STAGE", "Memory", "case", "server"]

STAGE = "memory"
_LARGE_ADAPTERS = 4


def server(sizes: Sizes) -> SideSpec:
    """The server of the stage; nothing but loading is asked of it."""
    small = AdapterSet(RANK_8_QV, sizes.memory_adapters)
    return SideSpec(SideKind.GRAFT, (small, AdapterSet(RANK_16_ALL, _LARGE_ADAPTERS)))


@dataclass(frozen=True, slots=True)
class Memory:
    """All adapters of the side loaded, of both kinds."""

    side: SideSpec
    asked: None = None

    @property
    def name(self) -> str:
        """What is done."""
        count = sum(each.count for each in self.side.adapters)
        return f"{self.side}, {count} adapters loaded"

    async def prepare(self, side: Side) -> None:
        """One adapter of each kind in and out, for what is only allocated once."""
        for each in self.side.adapters:
            await side.load(each.ids[0])
            await side.unload(each.ids[0])

    async def run(self, side: Side, round_index: int) -> Sample:
        """All is unloaded at the end."""
        names = [name for each in self.side.adapters for name in each.ids]
        before_bytes = await side.process_bytes()
        for name in names:
            await side.load(name)
        listed = await side.adapters()
        grown_bytes = await side.process_bytes() - before_bytes
        for name in names:
            await side.unload(name)
        return Sample(
            {
                "resident_bytes": (float(listed["resident_bytes"]),),
                "tensor_bytes": (float(sum(tensor_bytes(side.root / name) for name in names)),),
                "grown_bytes": (float(grown_bytes),),
            }
        )


def case(sizes: Sizes) -> Case:
    """One round: the bytes are the same each time."""
    measure = Memory(server(sizes))
    return Case(
        name="memory",
        about="Bytes of resident adapters against the bytes of the tensors in their files.",
        measures=(measure,),
        figures=(
            Figure(
                "resident bytes ÷ the files' tensor bytes",
                Term(measure, "resident_bytes"),
                Term(measure, "tensor_bytes"),
                Goal(1.1, at_least=False),
            ),
            Figure(
                "growth of the process ÷ the files' tensor bytes",
                Term(measure, "grown_bytes"),
                Term(measure, "tensor_bytes"),
            ),
        ),
        columns=(
            Column("resident, MB", "resident_bytes", factor=1e-6),
            Column("tensors in files, MB", "tensor_bytes", factor=1e-6),
            Column("growth of the process, MB", "grown_bytes", factor=1e-6),
        ),
        stage=STAGE,
        rounds=1,
        round_seconds=4,
    )
