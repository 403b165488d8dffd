"""How far a fusion is, told to whoever wants to hear. Knows no adapters but a name for the log."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import structlog

__all__ = ["FuseProgress", "Stage", "Tell", "no_tell", "on_loop"]

_log = structlog.get_logger(__name__)

Stage = Literal["merging", "comparing", "writing"]


@dataclass(frozen=True, slots=True)
class FuseProgress:
    """How far a fusion is: layers that are merged, prompts that are compared, bytes that are written."""

    stage: Stage
    done: int
    total: int


Tell = Callable[[FuseProgress], None]


def no_tell(progress: FuseProgress) -> None:
    """For a caller that does not want to know."""


def on_loop(tell: Tell, adapter_id: str) -> Tell:
    """`tell`, which is called on the event loop, for calls from any thread; logs each stage's beginning."""
    loop = asyncio.get_running_loop()
    stages: set[Stage] = set()

    def hear(progress: FuseProgress) -> None:
        if progress.stage not in stages:
            stages.add(progress.stage)
            _log.info("fuse_progress", adapter=adapter_id, stage=progress.stage, total=progress.total)
        tell(progress)

    return lambda progress: loop.call_soon_threadsafe(hear, progress) and None
