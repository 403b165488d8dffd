"""A loop over a tiny model, driven by hand, and mlx-lm's own answers to compare with."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models import gemma3_text
from mlx_lm.models.cache import KVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from server.engine.context import ModelContext
from server.engine.loop import GenerationLoop, LoopOptions
from server.engine.messages import (
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    SamplingParams,
    Scoring,
    Submit,
    Token,
)
from server.engine.model import LoadedModel, ModelInfo
from tests.models import VOCABULARY

GREEDY = SamplingParams(temperature=0.0)
NO_TOKENIZER = cast(TokenizerWrapper, None)


def loaded(model: nn.Module, vocabulary_tokens: int = VOCABULARY) -> LoadedModel:
    """A tiny model as `load_model` would return it, without files and tokenizer."""
    info = ModelInfo(NO_TOKENIZER, {}, "tiny", Path("tiny"), 4096, vocabulary_tokens, "sha256:tiny")
    return LoadedModel(model, info)


def make_context(model: nn.Module, prompt_cache_bytes: int = 1 << 24) -> ModelContext:
    return ModelContext.build(loaded(model), prompt_cache_bytes)


def make_loop(model: nn.Module, prompt_cache_bytes: int = 1 << 24, **options: Any) -> GenerationLoop:
    return GenerationLoop(make_context(model, prompt_cache_bytes), LoopOptions(**options))


def submit(request_id: str, prompt: list[int], max_tokens: int = 8, **fields: Any) -> Submit:
    """A greedy request on the base without stop tokens, unless `fields` say otherwise."""
    values = {"row": (), "stop_token_ids": frozenset(), "sampling": GREEDY, **fields}
    return Submit(request_id, prompt_tokens=tuple(prompt), max_tokens=max_tokens, **values)


def reference(model: nn.Module, prompt: list[int], max_tokens: int, **options: Any) -> list[int]:
    """What mlx-lm generates for this prompt alone, greedily unless `options` name a sampler."""
    steps = generate_step(mx.array(prompt), model, max_tokens=max_tokens, **options)
    return [int(token) for token, _ in steps]


class Transcript:
    """The events of all requests, by request; checks as they come that nothing follows an end."""

    def __init__(self) -> None:
        self.events: dict[str, list[Event]] = defaultdict(list)

    def add(self, events: list[tuple[str, Event]]) -> None:
        for request_id, event in events:
            assert not self.ended(request_id), f"{request_id} had ended, then came {event}"
            self.events[request_id].append(event)

    def ended(self, request_id: str) -> bool:
        events = self.events[request_id]
        return bool(events) and isinstance(events[-1], Finished | Failed)

    def tokens(self, request_id: str, choice: int = 0) -> list[int]:
        events = self.events[request_id]
        return [event.token for event in events if isinstance(event, Token) and event.choice == choice]

    def finish(self, request_id: str, choice: int = 0) -> ChoiceFinished:
        found = [e for e in self.events[request_id] if isinstance(e, ChoiceFinished) and e.choice == choice]
        (only,) = found
        return only

    def end(self, request_id: str) -> Finished | Failed:
        last = self.events[request_id][-1]
        assert isinstance(last, Finished | Failed)
        return last


def run(loop: GenerationLoop, *submits: Submit | Scoring, transcript: Transcript | None = None) -> Transcript:
    """Submit, then step until the loop is idle."""
    transcript = transcript or Transcript()
    for one in submits:
        loop.submit(one)
    while not loop.idle:
        transcript.add(loop.step())
    return transcript


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, length).tolist() for length in lengths]


def small_loop(model: nn.Module, **options: int) -> GenerationLoop:
    """Few rows and short prefill steps, so that every stage and its limits are passed through."""
    return make_loop(
        model, **{"max_batch_size": 4, "prefill_batch_size": 2, "prefill_step_tokens": 8, **options}
    )


def tiny_gemma() -> nn.Module:
    """Sliding windows of 8 tokens in 3 of 4 layers."""
    mx.random.seed(3)
    args = gemma3_text.ModelArgs(
        model_type="gemma3_text",
        hidden_size=64,
        num_hidden_layers=4,
        intermediate_size=96,
        num_attention_heads=4,
        head_dim=16,
        vocab_size=VOCABULARY,
        num_key_value_heads=2,
        sliding_window=8,
        sliding_window_pattern=4,
    )
    model = gemma3_text.Model(args)
    mx.eval(model.parameters())
    model.eval()
    return model


class Poisoned(nn.Module):
    """A model that cannot compute one token."""

    token = VOCABULARY - 1

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        if self.token in np.array(inputs):
            raise RuntimeError("poison")
        return self.model(inputs, cache=cache)


class CountingModel(nn.Module):
    """Notes how many tokens each forward reads, rows times length."""

    def __init__(self, model: Any, read: list[int]) -> None:
        super().__init__()
        self.inner: Any = model
        self._read = read

    @property
    def layers(self) -> list[nn.Module]:
        return self.inner.layers

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        self._read.append(inputs.size)
        return self.inner(inputs, cache=cache)


class FickleCache(KVCache):
    """A KV cache that cannot be asked about itself while `broken` holds anything."""

    def __init__(self, broken: list[bool]) -> None:
        super().__init__()
        self._broken = broken

    def is_trimmable(self) -> Literal[True]:
        if self._broken:
            raise RuntimeError("broken")
        return True


class FickleCaches(nn.Module):
    """A model whose rows have such caches."""

    def __init__(self, model: Any, broken: list[bool]) -> None:
        super().__init__()
        self.inner: Any = model
        self._broken = broken

    @property
    def layers(self) -> list[nn.Module]:
        return self.inner.layers

    def make_cache(self) -> list[KVCache]:
        return [FickleCache(self._broken) for _ in self.layers]

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        return self.inner(inputs, cache=cache)
