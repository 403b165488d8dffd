"""Adapters are written into a folder that a running server watches, while it streams.

The model is a tiny one, so that a stream is long in tokens and short in seconds; its tokens are single bytes,
which the answer's log-probabilities tell.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import load as load_tokenizer

from adapters_core.container import AdapterContainer
from server.openai.text import TextDecoder
from tests.adapters.support import BASE, read_model, write_model
from tests.e2e.running import Served, error_of, serving
from tests.e2e.test_under_traffic import until
from tests.models import make_adapter

SETTLE_SECONDS = 0.3
QUESTION = "hello"
ENDLESS_TOKENS = 60_000
WORDS = {"temperature": 0, "messages": [{"role": "user", "content": QUESTION}]}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with room for long answers."""
    folder = write_model(tmp_path_factory.mktemp("models") / BASE)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 65536}))
    return folder


@pytest.fixture(scope="module")
def written(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters v1 to v4, as a training would leave them, outside of what is watched."""
    folder = tmp_path_factory.mktemp("written")
    for seed in range(1, 5):
        make_adapter(folder / f"v{seed}", read_model(model_path), seed=10 + seed)
    return folder


@pytest.fixture
def watched(tmp_path: Path, written: Path) -> Path:
    root = tmp_path / "adapters"
    shutil.copytree(written / "v1", root / "x")
    return root


@pytest.fixture
def server(model_path: Path, watched: Path, tmp_path: Path) -> Iterator[Served]:
    settings = ["--adapters-dir", str(watched), "--watch", "--watch-settle-seconds", str(SETTLE_SECONDS)]
    with serving(tmp_path / "errors.log", "serve", str(model_path), *settings) as served:
        until(lambda: "x" in served.adapters())
        yield served


class Stream(threading.Thread):
    """A long greedy answer of one adapter, read on a thread of its own until its client leaves."""

    def __init__(self, server: Served, model: str, no_end: int) -> None:
        super().__init__()
        self.tokens: list[bytes] = []
        self._left = threading.Event()
        self._server = server
        self._body = {
            **WORDS, "model": model, "stream": True, "logprobs": True, "max_tokens": ENDLESS_TOKENS,
            "logit_bias": {str(no_end): -100},
        }  # fmt: skip
        self.start()

    def run(self) -> None:
        with self._server.http.stream("POST", "/v1/chat/completions", json=self._body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line.removeprefix("data: "))["choices"][0]
                    told = (choice.get("logprobs") or {}).get("content") or []
                    self.tokens += [bytes(token["bytes"]) for token in told]
                if self._left.is_set():
                    return

    def leave(self) -> list[bytes]:
        """The tokens that have come by the end."""
        self._left.set()
        self.join()
        return self.tokens


def reference(model_path: Path, adapter: Path, tokens: int) -> list[bytes]:
    """What mlx-lm answers with the adapter, kept from ending."""
    model, tokenizer = read_model(model_path), load_tokenizer(model_path)
    AdapterContainer.from_directory(adapter).load(into=model)
    prompt = mx.array(tokenizer.encode(QUESTION, add_special_tokens=False))
    bias = mx.where(mx.arange(model.args.vocab_size) == tokenizer.eos_token_id, -100.0, 0.0)
    steps = generate_step(
        prompt, model, max_tokens=tokens, logits_processors=[lambda _, logits: logits + bias]
    )
    decoder = TextDecoder(tokenizer)
    return [decoder.token_bytes(int(token)) for token, _ in steps]


def write_in_pieces(source: Path, target: Path) -> None:
    """Write an adapter over another as a trainer does: in place, the weights bit by bit."""
    target.mkdir(exist_ok=True)
    shutil.copy(source / "adapter_config.json", target / "adapter_config.json")
    content = (source / "adapters.safetensors").read_bytes()
    size = len(content) // 4 + 1
    with (target / "adapters.safetensors").open("wb", buffering=0) as file:
        for start in range(0, len(content), size):
            file.write(content[start : start + size])
            os.fsync(file.fileno())


def test_a_stream_ends_on_the_version_that_it_began_with_whatever_is_written_meanwhile(
    server: Served, watched: Path, written: Path, model_path: Path
) -> None:
    def shown() -> dict[str, Any]:
        return server.adapters()["x"]

    def says(model: str) -> str:
        reply = server.ask("POST", "/v1/chat/completions", json={**WORDS, "model": model, "max_tokens": 16})
        return reply["choices"][0]["message"]["content"]

    no_end = load_tokenizer(model_path).eos_token_id
    first = says("x")
    stream = Stream(server, "x", no_end)
    until(lambda: bool(stream.tokens))
    answers = []
    for version in (2, 3):
        write_in_pieces(written / f"v{version}", watched / "x")
        until(lambda version=version: shown()["version"] == version)
        answers.append(says("x"))
    assert len({first, *answers}) == 3
    assert [says("x@2"), says("x@3")] == answers

    content = (written / "v4" / "adapters.safetensors").read_bytes()
    (watched / "x" / "adapters.safetensors").write_bytes(content[: len(content) // 2])  # no more will come
    until(lambda: "adapter_folder_broken" in server.errors.read_text())
    now = shown()
    states = {each["version"]: each["state"] for each in now["versions"]}
    assert (states, now["in_flight"]) == ({1: "finishing", 2: "previous", 3: "current"}, 1)
    assert says("x") == answers[1]
    refused = server.ask("POST", "/v1/chat/completions", 404, json={**WORDS, "model": "x@1"})
    assert "'x@3', 'x@2'" in error_of(refused)["message"]

    there = len(stream.tokens)
    until(lambda: len(stream.tokens) > there + 20)
    tokens = stream.leave()
    assert tokens == reference(model_path, written / "v1", len(tokens))
    until(lambda: shown()["in_flight"] == 0)
    assert [each["version"] for each in shown()["versions"]] == [2, 3]

    assert server.ask("POST", "/v1/adapters/x/rollback")["version"] == 2
    assert says("x") == answers[0]
    shutil.copy(written / "v4" / "adapters.safetensors", watched / "x" / "0000100_adapters.safetensors")
    shutil.copytree(written / "v4", watched / "x", dirs_exist_ok=True)
    until(lambda: shown()["version"] == 4)
    assert says("x@step-100") == says("x")
    assert server.ask("GET", "/v1/adapters/x")["checkpoints"] == [100]
    assert server.errors.read_text().count("adapter_folder_broken") == 1
