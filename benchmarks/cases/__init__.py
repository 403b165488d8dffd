"""All cases by name, and those of the goal table, which a run without names takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.case import Case
from benchmarks.cases import (
    adapters,
    busy,
    churn,
    concurrency,
    distinct,
    fairness,
    first_token,
    latency,
    loading,
    memory,
    overhead,
    peer,
    prefix,
    registered,
    stalls,
    zipf,
)
from benchmarks.sizes import Sizes

__all__ = ["CASES", "TABLE", "choose"]

CASES: Mapping[str, Callable[[Sizes], Case]] = {
    "adapters": adapters.case,
    "peer": peer.case,
    "overhead": overhead.case,
    "first-token": first_token.case,
    "zipf": zipf.case,
    "stalls": stalls.case,
    "prefix": prefix.case,
    "memory": memory.case,
    "churn": churn.case,
    "concurrency": concurrency.case,
    "distinct": distinct.case,
    "latency": latency.case,
    "loading": loading.case,
    "registered": registered.case,
    "fairness": fairness.case,
    "busy": busy.case,
}

TABLE = ("adapters", "peer", "overhead", "first-token", "zipf", "stalls", "prefix", "memory", "churn")
"""The cases with goals, in the order of the table."""

_EVERYTHING = "all"


def choose(names: Sequence[str], sizes: Sizes) -> list[Case]:
    """The named cases, once each; those of the table without a name, and every one for "all".

    Raises: ValueError for a name that is none.
    """
    if unknown := sorted(set(names) - CASES.keys() - {_EVERYTHING}):
        raise ValueError(f"expected cases among all, {', '.join(CASES)}, got {', '.join(unknown)}")
    wanted = CASES if _EVERYTHING in names else dict.fromkeys(names or TABLE)
    return [CASES[name](sizes) for name in wanted]
