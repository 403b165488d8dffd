"""How much a run measures: the numbers that every case takes its loads from. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["GOAL_SIZES", "GPU_SIZES", "QUICK_SIZES", "Sizes"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The defaults are the sizes that the goals on a CPU are set for, `GPU_SIZES` those on a GPU.

    `QUICK_SIZES` only show that all works. `traffic_…` are of the case `traffic`: lengths in tokens, from
    shortest to longest; `traffic_percent` is the load, of what the bare generator can do. `mix_rows` are the
    batches of the case `mixes`, whose adapters have the ranks `mix_ranks`.
    """

    on_gpu: bool = False
    requests: int = 16
    adapters: int = 8
    many_adapters: int = 16
    max_tokens: int = 24
    peer_requests: tuple[int, ...] = (1, 4, 16)
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
    traffic_requests: int = 8
    traffic_prompts: tuple[int, int] = (50, 300)
    traffic_answers: tuple[int, int] = (16, 48)
    traffic_percent: int = 70
    staggered_requests: int = 16
    staggered_milliseconds: int = 500
    mix_rows: tuple[int, ...] = (16,)
    mix_adapters: int = 8
    mix_ranks: tuple[int, int, int] = (4, 8, 16)
    mix_steps: int = 4

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self) if each.name != "on_gpu"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,)) < 1:
                raise ValueError(f"expected {name} to be at least 1, got {value}")
        if self.resident > self.registered:
            raise ValueError(
                f"expected at most as many resident adapters as there are registered, got "
                f"{self.resident} of {self.registered}"
            )


GOAL_SIZES = Sizes()

GPU_SIZES = Sizes(
    on_gpu=True,
    requests=32,
    adapters=16,
    many_adapters=32,
    max_tokens=128,
    peer_requests=(1, 4, 16, 32),
    registered=200,
    closed_loop_requests=64,
    stream_tokens=400,
    cycles=200,
    warm_up_cycles=50,
    traffic_requests=96,
    traffic_prompts=(50, 800),
    traffic_answers=(32, 256),
    staggered_requests=64,
    staggered_milliseconds=20,
    mix_rows=(32, 8, 1),
    mix_adapters=32,
    mix_ranks=(8, 16, 32),
    mix_steps=12,
)

QUICK_SIZES = Sizes(
    requests=4,
    adapters=2,
    many_adapters=4,
    max_tokens=4,
    peer_requests=(1, 4),
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
    traffic_requests=6,
    traffic_prompts=(50, 80),
    traffic_answers=(4, 8),
    staggered_requests=4,
    staggered_milliseconds=20,
    mix_rows=(3,),
    mix_adapters=3,
    mix_ranks=(2, 3, 4),
    mix_steps=2,
)
