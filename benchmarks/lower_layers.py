"""What sharing lower layers between adapters could save at best: `python -m benchmarks.lower_layers`.

mlx-lm adapts the last layers of a model, 16 unless told otherwise. Below the first adapted one all compute
the same, so a prompt that was read with one adapter need be read with another from there on only, if the
hidden states at that place were kept. This times both ways of reading a prefix with the demo's model in
float32, side by side in each round, checks that they agree, and counts the bytes. Main thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from server.blas import load_openblas

load_openblas()

import mlx.core as mx  # noqa: E402 (MLX may be imported only after the BLAS)
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from mlx_lm.models.base import create_attention_mask  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from server.demo.model import default_cache_dir, demo_model  # noqa: E402
from server.engine.model import load_model  # noqa: E402

_ADAPTED_LAYERS = 16  # mlx-lm's default


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds are medians over the rounds; `ratio` is the median of the rounds' own ratios, upper ÷ full.

    `next_token_seconds` is what a prompt costs whose prefix is kept whole: its last token alone.
    `logits_difference` is the largest between both ways of reading.
    """

    tokens: int
    layers: int
    boundary: int
    rounds: int
    full_seconds: float
    upper_seconds: float
    next_token_seconds: float
    ratio: float
    ratio_spread: tuple[float, float]
    hidden_bytes: int
    kv_bytes: int
    lower_kv_bytes: int
    logits_difference: float


def run_layers(inner: Any, hidden: mx.array, caches: list[Any], first: int, last: int) -> mx.array:
    """The hidden states (B, L, D) after the layers from `first` up to, not including, `last`."""
    mask = create_attention_mask(hidden, caches[first])
    for layer, cache in zip(inner.layers[first:last], caches[first:last], strict=True):
        hidden = layer(hidden, mask, cache=cache)
    return hidden


def measure(model: nn.Module, tokens: int, boundary: int, rounds: int) -> Result:
    """Read `tokens` random tokens in full and from the layer `boundary` on, `rounds` times each in turn."""
    inner: Any = model["model"]
    vocabulary = inner.embed_tokens.weight.shape[0]
    prompt = mx.random.randint(0, vocabulary, (1, tokens), key=mx.random.key(0))
    layers = len(inner.layers)
    kept = make_prompt_cache(model)
    hidden = run_layers(inner, inner.embed_tokens(prompt), kept, 0, boundary)
    mx.eval(hidden, [cache.state for cache in kept[:boundary]])

    def timed(first: int, start: mx.array) -> tuple[float, mx.array, list[Any]]:
        caches = [*kept[:first], *make_prompt_cache(model)[first:]]
        begun = time.perf_counter()
        last = run_layers(inner, start, caches, first, layers)
        mx.eval(last, [cache.state for cache in caches[first:]])
        return time.perf_counter() - begun, last, caches

    embedded = inner.embed_tokens(prompt)
    mx.eval(embedded)
    timed(0, embedded)  # the first of each warms up
    timed(boundary, hidden)
    full: list[float] = []
    upper: list[float] = []
    one: list[float] = []
    difference = 0.0
    for _ in range(rounds):
        seconds, reference, caches = timed(0, embedded)
        full.append(seconds)
        seconds, shared, _ = timed(boundary, hidden)
        upper.append(seconds)
        apart = np.array(_logits(inner, reference)) - np.array(_logits(inner, shared))
        difference = max(difference, float(np.abs(apart).max()))
        begun = time.perf_counter()
        mx.eval(model(prompt[:, -1:], cache=caches))
        one.append(time.perf_counter() - begun)
    _, _, whole_caches = timed(0, embedded)
    kv_bytes = [sum(array.nbytes for array in cache.keys_and_values()) for cache in whole_caches]
    ratios = [part / whole for part, whole in zip(upper, full, strict=True)]
    return Result(
        tokens=tokens,
        layers=layers,
        boundary=boundary,
        rounds=rounds,
        full_seconds=statistics.median(full),
        upper_seconds=statistics.median(upper),
        next_token_seconds=statistics.median(one),
        ratio=statistics.median(ratios),
        ratio_spread=(min(ratios), max(ratios)),
        hidden_bytes=hidden.nbytes,
        kv_bytes=sum(kv_bytes),
        lower_kv_bytes=sum(kv_bytes[:boundary]),
        logits_difference=difference,
    )


def _logits(inner: Any, hidden: mx.array) -> mx.array:
    return inner.embed_tokens.as_linear(inner.norm(hidden[:, -1]))


def table(result: Result) -> Table:
    """The result, for people."""
    low, high = result.ratio_spread
    rows = [
        ("read in full", f"{result.full_seconds:.3f} s"),
        (f"read from layer {result.boundary} on", f"{result.upper_seconds:.3f} s"),
        ("ratio", f"{result.ratio:.2f} ({low:.2f} to {high:.2f})"),
        ("whole prefix kept, last token alone", f"{result.next_token_seconds:.3f} s"),
        ("hidden states at the boundary", f"{result.hidden_bytes / 2**20:.2f} MiB"),
        ("KV caches, all layers", f"{result.kv_bytes / 2**20:.2f} MiB"),
        (f"KV caches below layer {result.boundary}", f"{result.lower_kv_bytes / 2**20:.2f} MiB"),
        ("largest difference of logits", f"{result.logits_difference:.1e}"),
    ]
    title = f"{result.tokens} tokens, {result.layers} layers, medians of {result.rounds}"
    shown = Table("", title, show_edge=False)
    for row in rows:
        shown.add_row(*row)
    return shown


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lower_layers", description=__doc__)
    parser.add_argument("--tokens", type=int, default=512, help="length of the prefix")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is timed")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    options = parser.parse_args()
    folder = demo_model("float32", default_cache_dir(), progress=lambda message: None)
    model = load_model(str(folder), dtype="float32").model
    boundary = max(len(model["model"].layers) - _ADAPTED_LAYERS, 0)
    result = measure(model, options.tokens, boundary, options.rounds)
    Console().print(table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
