"""Requests that score, what they should be told, and what they were."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from adapters_core.mixed.residents import RowAdapters
from server.engine.messages import Finished, Scored, Scoring
from tests.engine.support import Transcript


def scoring(name: str, prompt: list[int], *answers: list[int], row: RowAdapters = ()) -> Scoring:
    return Scoring(name, row, tuple(prompt), tuple(map(tuple, answers)))


def expected(model: nn.Module, prompt: list[int], answer: list[int]) -> list[float]:
    """Log-probabilities from one forward of the whole text, by NumPy."""
    logits = np.array(model(mx.array([[*prompt, *answer]])))[0, len(prompt) - 1 : -1].astype(np.float64)
    peak = logits.max(axis=-1)
    chosen = logits[np.arange(len(answer)), answer]
    return (chosen - peak - np.log(np.exp(logits - peak[:, None]).sum(axis=-1))).tolist()


def scores(transcript: Transcript, name: str) -> dict[int, list[float]]:
    """By answer; each must come once, before the end."""
    *events, end = transcript.events[name]
    assert isinstance(end, Finished)
    assert all(isinstance(event, Scored) for event in events)
    found = {event.answer: list(event.logprobs) for event in events if isinstance(event, Scored)}
    assert len(found) == len(events)
    return found


def check(model: nn.Module, transcript: Transcript, *jobs: Scoring) -> None:
    for job in jobs:
        found = scores(transcript, job.request_id)
        assert sorted(found) == list(range(len(job.answers)))
        for index, answer in enumerate(job.answers):
            assert found[index] == pytest.approx(
                expected(model, list(job.prompt_tokens), list(answer)), abs=1e-4
            )
