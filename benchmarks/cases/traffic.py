"""Traffic as people have it: adapters of many kinds beside the base, real prompts, arrivals by chance.

A bare generator gets the same prompts at the same times, all on the base: it has no adapters. mlx_lm.server
gets them on the base too: it holds one adapter at a time, and loads the model anew for another.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.adapters import ALL, ATTENTION, QV, AdapterKind
from benchmarks.case import FIRST_TOKEN, GAP, RATE, Case, Column, Figure, Goal, Term
from benchmarks.library import AdapterSet
from benchmarks.loads import PassageLoad
from benchmarks.sides import SideKind, SideSpec
from benchmarks.sizes import Sizes
from benchmarks.summary import Statistic

__all__ = ["case", "kinds"]


def kinds(sizes: Sizes) -> tuple[AdapterKind, ...]:
    """LoRA of three ranks on three sets of layers, and DoRA on two of them."""
    low, middle, high = sizes.mix_ranks
    return (
        AdapterKind(low, QV),
        AdapterKind(middle, ALL),
        AdapterKind(middle, ATTENTION, dora=True),
        AdapterKind(high, QV),
        AdapterKind(low, ALL),
        AdapterKind(middle, ATTENTION),
        AdapterKind(low, ALL, dora=True),
        AdapterKind(high, ATTENTION),
    )


def case(sizes: Sizes) -> Case:
    """The whole server, the bare generator and mlx_lm.server."""
    sets = tuple(AdapterSet(kind, 1) for kind in kinds(sizes))
    bare = PassageLoad(
        SideSpec(SideKind.BARE),
        sizes.traffic_requests,
        sizes.traffic_prompts,
        sizes.traffic_answers,
        percent=sizes.traffic_percent,
        series=1,
    )
    names = tuple(name for each in sets for name in each.ids)
    ours = replace(bare, side=SideSpec(SideKind.GRAFT, sets), adapters=names)
    theirs = replace(bare, side=SideSpec(SideKind.MLX_LM))
    what = "mixed traffic by chance"
    first, gap = "first_token_seconds", "gap_seconds"
    p99 = Statistic.P99
    return Case(
        name="traffic",
        about=(
            "Adapters of many kinds and a third base rows, real prompts, arrivals by chance; the other sides "
            "on the base alone."
        ),
        measures=(bare, ours, theirs),
        figures=(
            _figure(f"{what} ÷ bare generator, base, tokens/s", ours, bare, "tokens_per_second", 0.95),
            _figure(f"{what} ÷ bare generator, base, median first token", ours, bare, first, 1.1),
            _figure(f"{what} ÷ bare generator, base, p99 first token", ours, bare, first, None, p99),
            _figure(f"{what} ÷ bare generator, base, median gap", ours, bare, gap, None),
            _figure(f"{what} ÷ bare generator, base, p99 gap", ours, bare, gap, 1.0, p99),
            _figure(f"{what} ÷ mlx_lm.server, base, tokens/s", ours, theirs, "tokens_per_second", None),
            _figure(f"{what} ÷ mlx_lm.server, base, median first token", ours, theirs, first, None),
            _figure(f"{what} ÷ mlx_lm.server, base, p99 gap", ours, theirs, gap, None, p99),
        ),
        columns=(
            RATE,
            FIRST_TOKEN,
            Column("p99, ms", first, p99, 1000, 0),
            GAP,
            Column("p99, ms", gap, p99, 1000, 0),
            Column("requests/s", "requests_per_second", digits=2),
        ),
        stage="traffic",
        round_seconds=75,
    )


def _figure(
    label: str,
    ours: PassageLoad,
    other: PassageLoad,
    quantity: str,
    bound: float | None,
    statistic: Statistic = Statistic.MEDIAN,
) -> Figure:
    goal = None if bound is None else Goal(bound, at_least=quantity == "tokens_per_second")
    return Figure(label, Term(ours, quantity, statistic), Term(other, quantity, statistic), goal)
