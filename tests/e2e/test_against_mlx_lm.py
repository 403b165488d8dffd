"""One mixed batch over HTTP gives, token by token, what mlx-lm gives for one adapter at a time."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from tests.e2e.running import BASE, DEMO_ADAPTERS, ROOT, Served, environment, serving
from tests.models import make_adapter

REQUESTS = 14
MAX_TOKENS = 12

Asked = tuple[str, str]
Answered = tuple[str, list[str]]
"""A text, and its tokens, each as a text."""


@pytest.fixture(scope="module")
def adapters_root(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's adapters and one more: a DoRA of all linear layers, of a rank that fits no other's."""
    root = shutil.copytree(DEMO_ADAPTERS, tmp_path_factory.mktemp("served") / "adapters")
    model, *_ = mlx_lm.load(str(demo_model_path))
    make_adapter(root / "stranger", model, "dora", rank=5, scale=4.0, num_layers=4, keys=None, size=0.03)
    return root


@pytest.fixture(scope="module")
def server(
    demo_model_path: Path, adapters_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """The demo's model with all these adapters loaded."""
    errors = tmp_path_factory.mktemp("logs") / "errors.log"
    with serving(errors, "serve", str(demo_model_path), "--adapters-dir", str(adapters_root)) as served:
        served.restore()
        yield served


@pytest.fixture(scope="module")
def asked(server: Served, adapters_root: Path, questions: list[str]) -> list[Asked]:
    """Who is asked what: the base and every adapter in turn, with ever other questions."""
    names = [BASE, *sorted(folder.name for folder in adapters_root.iterdir())]
    return [(names[turn % len(names)], questions[turn * 3 % len(questions)]) for turn in range(REQUESTS)]


@pytest.fixture(scope="module")
def alone(asked: list[Asked], adapters_root: Path, demo_model_path: Path) -> dict[Asked, Answered]:
    """mlx-lm's own answers, one at a time."""
    by_name: dict[str, list[str]] = {}
    for name, question in asked:
        by_name.setdefault(name, []).append(question)
    given = {
        "model": str(demo_model_path),
        "adapters": {name: str(adapters_root / name) for name in by_name if name != BASE},
        "questions": by_name,
        "max_tokens": MAX_TOKENS,
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.reference"],
        cwd=ROOT,
        env=environment(),
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {
        (name, question): (text, tokens)
        for name, questions in by_name.items()
        for question, (text, tokens) in zip(questions, found[name], strict=True)
    }


def test_a_mixed_batch_gives_the_tokens_of_mlx_lm(
    server: Served, asked: list[Asked], alone: dict[Asked, Answered]
) -> None:
    assert len({name for name, _ in asked}) >= 7
    with server.openai() as client, ThreadPoolExecutor(REQUESTS) as pool:

        def ask(name: str, question: str) -> Answered:
            messages: list[Any] = [{"role": "user", "content": question}]
            answer = client.chat.completions.create(
                model=name, messages=messages, temperature=0, max_tokens=MAX_TOKENS, logprobs=True
            )
            assert answer.model == name
            choice = answer.choices[0]
            assert choice.logprobs is not None
            scores = choice.logprobs.content or []
            # A token that is no whole character is written as its bytes; mlx-lm's text has a mark.
            tokens = [bytes(score.bytes or ()).decode(errors="replace") for score in scores]
            return choice.message.content or "", tokens

        futures = [pool.submit(ask, name, question) for name, question in asked]
        most_rows = _most_rows(server, futures)
        answers = [future.result() for future in futures]
    assert most_rows > REQUESTS // 2, "expected the requests to be decoded together"
    assert {key: answers[turn] for turn, key in enumerate(asked)} == alone


def _most_rows(server: Served, futures: list[Future[Answered]]) -> int:
    """The most rows that were decoded together until all is answered."""
    most = 0
    while wait(futures, timeout=0.1).not_done:
        text = server.http.get("/metrics").text
        found = re.search(r"^graft_running_rows (\S+)$", text, re.MULTILINE)
        assert found is not None
        most = max(most, int(float(found[1])))
    return most
