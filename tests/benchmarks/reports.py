"""A small report that was not measured, for the tests of what is made from reports."""

from __future__ import annotations

from pathlib import Path

from benchmarks.adapters import RANK_8_QV
from benchmarks.case import Case, Figure, Goal, Measure, Sample, Term
from benchmarks.cases import GPU_TABLE, TABLE
from benchmarks.loads import LoadMeasure
from benchmarks.report import Report, make_report
from benchmarks.runner import CaseOutcome
from benchmarks.sides import SideKind, SideSpec
from server.environment import describe_environment, describe_model

OURS = LoadMeasure(SideSpec(SideKind.GRAFT), 4, 6)
MIXED = LoadMeasure(SideSpec(SideKind.GRAFT), 4, 6, 2, RANK_8_QV)
THEIRS = LoadMeasure(SideSpec(SideKind.MLX_LM), 4, 6)


def sample(rate: float, *texts: str) -> Sample:
    values = {
        "tokens_per_second": (rate,),
        "first_token_seconds": (0.5, 1.5),
        "gap_seconds": (0.05, 0.15, 0.25),
    }
    return Sample(values, texts)


def report_of(model_path: Path, *, whole: bool = True, on_gpu: bool = False) -> Report:
    """Two cases that succeeded and one that failed; `whole` adds the other cases of the table, empty."""
    ours = {1: sample(24, "a", "b"), 2: sample(12, "c"), 3: sample(6, "c")}
    theirs = {1: sample(6, "a", "x"), 2: sample(6, "d")}
    mixed = {1: sample(12, "A", "B"), 2: sample(9, "C")}
    rate = "tokens_per_second"
    measures: tuple[Measure, ...] = (OURS, THEIRS)
    figure = Figure("ours ÷ theirs [x]", Term(OURS, rate), Term(THEIRS, rate), Goal(3.5, at_least=True))
    plain = Figure("growth", Term(OURS, rate), unit="%", goal=Goal(12, at_least=False))
    rated = Figure("mixed ÷ base", Term(MIXED, rate), Term(OURS, rate))
    outcomes = [
        CaseOutcome(Case("one", "About [one].", measures, (figure, plain)), {OURS: ours, THEIRS: theirs}),
        CaseOutcome(
            Case("fairness", "Two.", (OURS, MIXED), (rated,), remarks=lambda found: ["odd [that]"]),
            {OURS: ours, MIXED: mixed},
        ),
        CaseOutcome(Case("churn", "Three.", (OURS,)), failure="it broke [off]\nits log"),
    ]
    if whole:
        names = GPU_TABLE if on_gpu else TABLE
        outcomes += [CaseOutcome(Case(name, "", ())) for name in names if name != "churn"]
    return make_report(
        outcomes,
        options={"rounds": 3, "sizes": {"on_gpu": on_gpu}},
        model=describe_model(model_path),
        environment=describe_environment(),
        seconds=12.34,
        notes=["a note"],
    )
