"""Whole runs, small: real processes, a real model, real adapters."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from benchmarks.cases import Case, LoadName, Measure, Question, Ratio, SideName
from benchmarks.cli import Options, measure, run_to_end
from benchmarks.processes import ProcessError
from benchmarks.sides import SideContext, open_side

MLX_LM_MIXED = Measure(SideName.MLX_LM, LoadName.MIXED)
MLX_LM_BASE = Measure(SideName.MLX_LM, LoadName.BASE)
BARE_BASE = Measure(SideName.BARE, LoadName.BASE)
REFERENCE = Case(
    "reference",
    "mlx_lm.server and a bare generator.",
    (Ratio("mixed", MLX_LM_MIXED, MLX_LM_BASE), Ratio("overhead", MLX_LM_BASE, BARE_BASE)),
)


def test_the_references_answer_alike_and_adapters_change_their_answers(tiny_model_path: Path) -> None:
    told: list[str] = []
    options = Options(rounds=1, requests=4, adapters=2, max_tokens=5)
    report = measure([REFERENCE], tiny_model_path, options, told.append)
    rounds = report.outcome.rounds
    texts = {found: [answer.text.strip() for answer in rounds[found][1].answers] for found in rounds}
    assert texts[MLX_LM_BASE] == texts[BARE_BASE]
    assert texts[MLX_LM_MIXED] != texts[MLX_LM_BASE]
    assert report.outcome.notes == ()
    for found in rounds.values():
        assert all(1 <= answer.completion_tokens <= 5 for answer in found[1].answers)
    assert "Round 1 of 1: mlx_lm.server, mixed …" in told


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
