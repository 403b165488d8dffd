"""What mixing adapters costs: requests over several adapters against the same requests on the base.

Measured together with `peer` and `overhead`, which need the same measures.
"""

from __future__ import annotations

from benchmarks.adapters import RANK_8_QV, RANK_16_ALL, AdapterKind
from benchmarks.case import Case, Figure, Goal, Measure, Samples, Term
from benchmarks.library import AdapterSet
from benchmarks.loads import LoadMeasure
from benchmarks.sides import SideKind, SideSpec
from benchmarks.sizes import Sizes

__all__ = ["STAGE", "base", "case", "mixed", "server"]

STAGE = "throughput"
_ALL = RANK_16_ALL


def server(sizes: Sizes, kind: SideKind = SideKind.GRAFT) -> SideSpec:
    """A side with all adapters of the stage.

    Our server keeps no prompts there: the few tokens that all begin with would be work that others do.
    """
    options = ("--prompt-cache-bytes", "0") if kind is SideKind.GRAFT else ()
    small = AdapterSet(RANK_8_QV, max(sizes.adapters, sizes.many_adapters))
    return SideSpec(kind, (small, AdapterSet(_ALL, sizes.adapters)), options)


def base(sizes: Sizes, kind: SideKind = SideKind.GRAFT) -> LoadMeasure:
    """The requests on the base."""
    return LoadMeasure(server(sizes, kind), sizes.requests, sizes.max_tokens)


def mixed(
    sizes: Sizes, side: SideKind = SideKind.GRAFT, *, kind: AdapterKind = RANK_8_QV, many: bool = False
) -> LoadMeasure:
    """The requests over the adapters, or over `many` of them."""
    return LoadMeasure(
        server(sizes, side),
        sizes.requests,
        sizes.max_tokens,
        adapters=sizes.many_adapters if many else sizes.adapters,
        kind=kind,
        series=1 if many else 0,
    )


def case(sizes: Sizes) -> Case:
    """Rank 8 on q and v, and rank 16 on all linear layers."""
    plain, small, large = base(sizes), mixed(sizes), mixed(sizes, kind=_ALL)

    def remarks(samples: Samples) -> list[str]:
        return [line for measure in (small, large) for line in _without_effect(samples, plain, measure)]

    load = f"{sizes.requests} requests over {sizes.adapters} adapters"
    return Case(
        name="adapters",
        about="Requests over several adapters at once, against the same on the base.",
        measures=(plain, small, large),
        figures=(
            Figure(
                f"{load}, rank 8 on q and v ÷ on the base",
                Term(small, "tokens_per_second"),
                Term(plain, "tokens_per_second"),
                Goal(0.95, at_least=True),
            ),
            Figure(
                f"{load}, rank 16 on all linear layers ÷ on the base",
                Term(large, "tokens_per_second"),
                Term(plain, "tokens_per_second"),
                Goal(0.85, at_least=True),
            ),
        ),
        stage=STAGE,
        remarks=remarks,
        round_seconds=34,
    )


def _without_effect(samples: Samples, plain: Measure, mixed: Measure) -> list[str]:
    rounds = samples[mixed].keys() & samples[plain].keys()
    if all(samples[mixed][index].texts == samples[plain][index].texts for index in rounds):
        return [f"{mixed.name}: every answer is the base's: the adapters had no effect"]
    return []
