"""How much a run measures: the numbers that every case takes its loads from. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GOAL_SIZES", "QUICK_SIZES", "Sizes"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The defaults are the sizes that the goals are set for; `QUICK_SIZES` only shows that all works."""

    requests: int = 16
    adapters: int = 8
    many_adapters: int = 16
    max_tokens: int = 24
    first_token_samples: int = 8
    registered: int = 1000
    resident: int = 64
    closed_loop_requests: int = 32
    closed_loop_warm_up: int = 160
    streams: int = 4
    stream_tokens: int = 48
    loads: int = 20
    prefix_tokens: int = 512
    memory_adapters: int = 64
    cycles: int = 1000
    warm_up_cycles: int = 100
    crowd: int = 48

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} to be at least 1, got {getattr(self, name)}")
        if self.resident > self.registered:
            raise ValueError(
                f"expected at most as many resident adapters as there are registered, got "
                f"{self.resident} of {self.registered}"
            )


GOAL_SIZES = Sizes()

QUICK_SIZES = Sizes(
    requests=4,
    adapters=2,
    many_adapters=4,
    max_tokens=4,
    first_token_samples=2,
    registered=12,
    resident=4,
    closed_loop_requests=8,
    closed_loop_warm_up=8,
    streams=2,
    stream_tokens=24,
    loads=3,
    prefix_tokens=64,
    memory_adapters=4,
    cycles=8,
    warm_up_cycles=4,
    crowd=6,
)
