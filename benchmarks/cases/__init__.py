"""All cases by name, and those of the goal table, which a run without names takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.case import Case
from benchmarks.cases import (
    adapters,
    busy,
    churn,
    fairness,
    first_token,
    loading,
    loop,
    memory,
    mixes,
    new_kind,
    overhead,
    peer,
    prefix,
    registered,
    stalls,
    switching,
    traffic,
    zipf,
)
from benchmarks.sizes import Sizes

__all__ = ["CASES", "GPU_TABLE", "TABLE", "choose"]

CASES: Mapping[str, Callable[[Sizes], Case]] = {
    "traffic": traffic.case,
    "loop": loop.case,
    "mixes": mixes.case,
    "new-kind": new_kind.case,
    "adapters": adapters.case,
    "peer": peer.case,
    "switching": switching.case,
    "overhead": overhead.case,
    "first-token": first_token.case,
    "zipf": zipf.case,
    "stalls": stalls.case,
    "prefix": prefix.case,
    "memory": memory.case,
    "churn": churn.case,
    "loading": loading.case,
    "registered": registered.case,
    "fairness": fairness.case,
    "busy": busy.case,
}

_EVERYWHERE = ("first-token", "zipf", "stalls", "prefix", "memory", "churn")

TABLE = ("traffic", "mixes", "adapters", "peer", "switching", "overhead", *_EVERYWHERE)
"""The cases with goals on a CPU, in the order of the table."""

GPU_TABLE = ("traffic", "loop", "mixes", "new-kind", "adapters", "peer", "overhead", *_EVERYWHERE)
"""Those with goals on a GPU."""

_EVERYTHING = "all"


def choose(names: Sequence[str], sizes: Sizes) -> list[Case]:
    """The named cases, once each; those of the device's table without a name, and every one for "all".

    Raises: ValueError for a name that is none.
    """
    if unknown := sorted(set(names) - CASES.keys() - {_EVERYTHING}):
        raise ValueError(f"expected cases among all, {', '.join(CASES)}, got {', '.join(unknown)}")
    table = GPU_TABLE if sizes.on_gpu else TABLE
    wanted = CASES if _EVERYTHING in names else dict.fromkeys(names or table)
    return [CASES[name](sizes) for name in wanted]
