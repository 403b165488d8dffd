"""What is compared: loads, the sides that they are put on, and the ratios that a case reports.

Plain data. Knows neither how a side is started nor how a load is generated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from benchmarks.prompts import prompts

__all__ = [
    "CASES",
    "Case",
    "Load",
    "LoadName",
    "Measure",
    "Question",
    "Ratio",
    "SideName",
    "make_loads",
    "measures_of",
]


class SideName(StrEnum):
    """What answers."""

    GRAFT = "mlx-graft"
    MLX_LM = "mlx_lm.server"
    BARE = "BatchGenerator"


class LoadName(StrEnum):
    """What is asked."""

    BASE = "base"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class Question:
    """One request: `adapter` is the index of the adapter that answers it, None for the base."""

    prompt: str
    max_tokens: int
    adapter: int | None


@dataclass(frozen=True, slots=True)
class Load:
    """`requests` questions at once, dealt to `adapters` adapters in turn; 0 adapters is the base alone."""

    name: LoadName
    requests: int
    adapters: int
    max_tokens: int

    def questions(self, round_index: int, max_tokens: int | None = None) -> list[Question]:
        """The questions of a round; loads of the same size ask the same ones in the same round."""
        return [
            Question(prompt, max_tokens or self.max_tokens, index % self.adapters if self.adapters else None)
            for index, prompt in enumerate(prompts(round_index, self.requests))
        ]


@dataclass(frozen=True, slots=True)
class Measure:
    """A load on a side: what one measurement measures."""

    side: SideName
    load: LoadName

    def __str__(self) -> str:
        return f"{self.side}, {self.load}"


@dataclass(frozen=True, slots=True)
class Ratio:
    """The token rate of one measure divided by that of another."""

    name: str
    numerator: Measure
    denominator: Measure


@dataclass(frozen=True, slots=True)
class Case:
    """A comparison: its ratios say what has to be measured."""

    name: str
    about: str
    ratios: tuple[Ratio, ...]


_GRAFT_BASE = Measure(SideName.GRAFT, LoadName.BASE)
_GRAFT_MIXED = Measure(SideName.GRAFT, LoadName.MIXED)
_MLX_LM_BASE = Measure(SideName.MLX_LM, LoadName.BASE)
_MLX_LM_MIXED = Measure(SideName.MLX_LM, LoadName.MIXED)
_BARE_BASE = Measure(SideName.BARE, LoadName.BASE)

CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case(
            "adapters",
            "Requests over several adapters against the same on the base, and both against mlx_lm.server.",
            (
                Ratio("mixed ÷ base, mlx-graft", _GRAFT_MIXED, _GRAFT_BASE),
                Ratio("mlx-graft ÷ mlx_lm.server, base", _GRAFT_BASE, _MLX_LM_BASE),
                Ratio("mlx-graft ÷ mlx_lm.server, mixed", _GRAFT_MIXED, _MLX_LM_MIXED),
            ),
        ),
        Case(
            "overhead",
            "The whole server against a bare BatchGenerator: tokens in, tokens out, no prompt cache.",
            (Ratio("mlx-graft ÷ BatchGenerator, base", _GRAFT_BASE, _BARE_BASE),),
        ),
    )
}


def measures_of(cases: Iterable[Case]) -> list[Measure]:
    """Everything that the cases need, each once, in the order in which their ratios name it."""
    pairs = ((ratio.numerator, ratio.denominator) for case in cases for ratio in case.ratios)
    return list(dict.fromkeys(measure for pair in pairs for measure in pair))


def make_loads(requests: int, adapters: int, max_tokens: int) -> dict[LoadName, Load]:
    """The base load and the mixed load of the same size."""
    return {
        LoadName.BASE: Load(LoadName.BASE, requests, 0, max_tokens),
        LoadName.MIXED: Load(LoadName.MIXED, requests, adapters, max_tokens),
    }
