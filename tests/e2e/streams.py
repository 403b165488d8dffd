"""Long greedy answers of a tiny model, read on a thread of their own, and mlx-lm's own to compare them with.

A stream is as long as its test needs it, on a machine of any speed: what is compared is what has come by
then. The model's tokens are single bytes, which the answer's log-probabilities tell.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.tokenizer_utils import load as load_tokenizer

from adapters_core.container import AdapterContainer
from server.openai.text import TextDecoder
from tests.adapters.support import read_model, write_model
from tests.e2e.running import Served, until

QUESTION = "hello"
WORDS = {"temperature": 0, "messages": [{"role": "user", "content": QUESTION}]}
NO_END = {"256": -100}
"""A bias against the one token that is no byte, and ends an answer."""
ENDLESS_TOKENS = 60_000


def write_long_model(folder: Path) -> Path:
    """The tiny model with room for long answers."""
    write_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 65536}))
    return folder


class Stream(threading.Thread):
    """An answer of one adapter, some of which has come, until it ends or its client leaves."""

    def __init__(self, server: Served, model: str, tokens: int = ENDLESS_TOKENS) -> None:
        super().__init__()
        self.tokens: list[bytes] = []
        self.reason: str | None = None
        self._left = threading.Event()
        self._server = server
        self._body = {
            **WORDS,
            "model": model,
            "stream": True,
            "logprobs": True,
            "max_tokens": tokens,
            "logit_bias": NO_END,
        }
        self.start()
        self.more()

    def run(self) -> None:
        with self._server.http.stream("POST", "/v1/chat/completions", json=self._body) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line.removeprefix("data: "))["choices"][0]
                    told = (choice.get("logprobs") or {}).get("content") or []
                    self.tokens += [bytes(token["bytes"]) for token in told]
                    self.reason = choice["finish_reason"]
                if self._left.is_set():
                    return

    def more(self) -> None:
        """Wait for some more tokens: the stream goes on."""
        there = len(self.tokens)
        until(lambda: len(self.tokens) > there + 20)

    def leave(self) -> list[bytes]:
        """Close the stream, unless it has ended; the tokens that have come."""
        self._left.set()
        self.join()
        return self.tokens

    def rest(self) -> list[bytes]:
        """All tokens, once the stream has ended as it should."""
        self.join()
        assert self.reason == "length"
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
