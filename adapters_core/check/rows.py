"""Logits of rows: of a batch with a bank's adapters, and of one row alone with mlx-lm's own layers.

Every row is fed tokens that were chosen before, so that an error in one step does not hide in the next.
Runs on the thread that owns the model; the model is as it was after each call.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..bank import AdapterBank
from ..config import CONFIG_FILE, AdapterConfig, FineTuneType
from ..container import AdapterContainer
from ..formats.weights import WEIGHTS_FILE
from ..layers.modules import is_quantized
from ..layers.surgery import replace_modules
from ..layers.targets import resolve_targets
from ..mixed.forms import Forms
from ..mixed.residents import RowAdapters
from ..mixed.routing import RoutedModel, Routing

__all__ = [
    "Expected",
    "Resident",
    "batch_logits",
    "expect",
    "merged_cache",
    "own_layers",
    "reference_layers",
]

_MLX_LM_BITS = (2, 4, 8)  # at others its DoRA takes the layer for one of another size


class Resident:
    """A model with a bank: what is under test."""

    def __init__(self, model: nn.Module, forms: Forms | None = None) -> None:
        self.routing = Routing(forms)
        self.bank = AdapterBank(model, self.routing)
        self.routed = RoutedModel(model, self.routing)


@dataclass(frozen=True, slots=True)
class Expected:
    """A row by itself: its prompt, the tokens that it chose, and the logits that each was chosen by.

    prompt (L,), tokens (steps,), logits (1 + steps, vocabulary) in float32; evaluated.
    """

    prompt: mx.array
    tokens: mx.array
    logits: mx.array

    @property
    def fed(self) -> mx.array:
        """All that the row is fed, (L + steps,)."""
        return mx.concatenate([self.prompt, self.tokens])


def expect(model: nn.Module, prompt: mx.array, steps: int) -> Expected:
    """What `model`, as it is now, answers to `prompt` (L,): greedily, one row alone."""
    cache = make_prompt_cache(model)
    logits = [_last(model(prompt[None], cache=cache))]
    tokens: list[mx.array] = []
    for _ in range(steps):
        tokens.append(mx.argmax(logits[-1], axis=-1))
        logits.append(_last(model(tokens[-1][:, None], cache=cache)))
        mx.eval(logits[-1])
    chosen = mx.concatenate(tokens) if tokens else mx.zeros((0,), mx.uint32)
    found = Expected(prompt, chosen.astype(prompt.dtype), mx.concatenate(logits))
    mx.eval(found.tokens, found.logits)
    return found


def batch_logits(routed: RoutedModel, rows: Sequence[RowAdapters], fed: mx.array, steps: int) -> mx.array:
    """(B, 1 + steps, vocabulary) in float32 of `rows`; `fed` (B, L + steps) is what they read."""
    cache = merged_cache(routed, rows)
    length = fed.shape[1] - steps
    logits = [_last(routed(fed[:, :length], cache=cache))]
    for at in range(length, fed.shape[1]):
        mx.eval(logits)
        logits.append(_last(routed(fed[:, at : at + 1], cache=cache)))
    found = mx.stack(logits, axis=1)
    mx.eval(found)
    return found


def merged_cache(routed: RoutedModel, rows: Sequence[RowAdapters]) -> list[Any]:
    """An empty cache for a batch of `rows`."""
    return [entries[0].merge(list(entries)) for entries in zip(*map(routed.new_cache, rows), strict=True)]


def reference_layers(model: nn.Module, folder: Path) -> tuple[AbstractContextManager[None], str]:
    """A context in which `model` has the adapter in `folder` by mlx-lm's layers, and whose they are.

    mlx-lm's DoRA errs over some quantised layers, which are then this project's own, one adapter at a time.
    """
    config = AdapterConfig.from_directory(folder)
    targets = resolve_targets(model, config)
    if config.fine_tune_type is FineTuneType.DORA and any(_errs_in_dora(one) for one in targets.values()):
        return own_layers(model, folder), "this project's layers, one adapter at a time"
    return _mlx_lm_layers(model, folder, targets), "mlx-lm's layers, one row at a time"


def _errs_in_dora(module: Any) -> bool:
    return is_quantized(module) and (module.bits not in _MLX_LM_BITS or module.mode != "affine")


@contextmanager
def own_layers(model: nn.Module, folder: Path) -> Iterator[None]:
    """`model` has the adapter in `folder` by the layers of `AdapterContainer.load`."""
    container = AdapterContainer.from_directory(folder)
    container.load(into=model)
    try:
        yield
    finally:
        container.unload(from_=model)


@contextmanager
def _mlx_lm_layers(model: nn.Module, folder: Path, targets: dict[str, nn.Module]) -> Iterator[None]:
    # As its `load_adapters`, whose check of names refuses what mlx-lm itself writes for split layers.
    config = json.loads((folder / CONFIG_FILE).read_text())
    is_dora = config["fine_tune_type"] == "dora"
    try:
        linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"], use_dora=is_dora)
        model.load_weights(str(folder / WEIGHTS_FILE), strict=False)
        model.eval()
        yield
    finally:
        replace_modules(model, targets)


def _last(logits: mx.array) -> mx.array:
    return logits[:, -1].astype(mx.float32)
