"""How sides begin and end, also badly."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from benchmarks.cases import Question, SideName
from benchmarks.cli import run_to_end
from benchmarks.processes import ProcessError
from benchmarks.sides import SideContext, open_side


async def test_a_side_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    context = SideContext(tmp_path / "no-model", (), tmp_path, 60, 60)
    async with open_side(SideName.BARE, context) as side:
        with pytest.raises(ProcessError, match=r"(?s)BatchGenerator: .*exit code 1.*no-model"):
            await side.run([Question("Hello?", 3, None)])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_end_cancels_the_run_and_a_second_breaks_nothing_off(number: signal.Signals) -> None:
    ended: list[str] = []

    async def interrupted(name: str) -> None:
        try:
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    async def run() -> None:
        try:
            await interrupted("the work")
        finally:
            try:
                await interrupted("the first process")
            finally:
                ended.append("the second process")

    with pytest.raises(asyncio.CancelledError):
        run_to_end(run())
    assert ended == ["the work", "the first process", "the second process"]
