"""How far the outputs of fused layers are from those of the adapted ones, on real prompts.

The weights' error says what was rounded; this says what of it shows. Each adapted layer is given the inputs
that it has in the adapted model, and so are the base layer and the fused one, so that the error of one layer
does not carry over into the next. The logits, in turn, are those of the whole fused model. Knows no text: a
prompt is a row of token ids. Replaces modules of the model that it is given and puts them back: of a model
that is being served, give it a copy. Runs on any thread that may compute with the model's weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from ..errors import InvalidAdapterError
from ..layers.adapted import AdaptedLayer
from ..layers.surgery import replace_modules
from .dense import dequantizing

__all__ = ["ActivationReport", "compare_activations"]


@dataclass(frozen=True, slots=True)
class ActivationReport:
    """What a fusion changed in the outputs, over all tokens of all prompts.

    A layer's error is ‖y' - y‖ / ‖y - y₀‖: y' the fused layer's output, y the adapted one's, y₀ the base's.
    Layers in which the adapter changes no output at all are left out, and none is the worst where all errors
    are 0. `agreement` is the share of tokens after which both models find the same token the likeliest. KL is
    Σ p log(p / q) in nats, p the adapted model's probabilities of the next token and q the fused one's.
    """

    prompts: int
    tokens: int
    error_mean: float
    error_worst: float
    worst_module: str | None
    agreement: float
    kl_mean: float
    kl_max: float


class _Observed(nn.Module):
    """The adapted layer in its place, which notes what the fused one would have made of each input."""

    def __init__(self, adapted: AdaptedLayer, fused: nn.Module) -> None:
        super().__init__()
        self["adapted"] = adapted
        self["fused"] = fused
        self._noted: list[tuple[mx.array, mx.array]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._note(lambda module: module(*args, **kwargs))

    def as_linear(self, x: mx.array) -> mx.array:
        """A tied embedding in its second place, as the head."""
        return self._note(lambda module: module.as_linear(x))

    def __getattr__(self, key: str) -> Any:
        # Some models read sizes off their layers.
        return self[key] if key in self else getattr(self["adapted"], key)

    def take(self) -> tuple[float, float]:
        """(‖y' - y‖², ‖y - y₀‖²) of the calls since the last one; evaluates them."""
        noted, self._noted = self._noted, []
        if not noted:
            return 0.0, 0.0
        lost, size = (mx.sum(mx.stack(list(values))) for values in zip(*noted, strict=True))
        return cast(float, lost.item()), cast(float, size.item())

    def _note(self, call: Callable[[Any], Any]) -> Any:
        expected = call(self["adapted"])
        exact = _whole(expected)
        lost = mx.sum(mx.square(_whole(call(self["fused"])) - exact))
        size = mx.sum(mx.square(exact - _whole(call(self["adapted"].reverted()))))
        self._noted.append((lost, size))
        return expected


def _whole(output: mx.array | Sequence[mx.array]) -> mx.array:
    """A layer's output in float32; of a split layer, all of its outputs."""
    whole = output if isinstance(output, mx.array) else mx.concatenate(list(output), axis=-1)
    return whole.astype(mx.float32)


def compare_activations(
    model: Any,
    layers: Mapping[str, AdaptedLayer],
    modules: Mapping[str, nn.Module],
    rows: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
    source: str = "adapter",
) -> ActivationReport:
    """Compare `model` with `layers` in it and with `modules` in their places; both by path.

    `rows` are prompts, each at least one token; one is computed at a time. `progress` is told how many of
    how many are done. The model is as before when this returns or raises.

    Raises:
        InvalidAdapterError: outputs or logits, adapted or fused, are not finite, so that neither could be
            served; `source` is what the adapter is called.
    """
    others = dequantizing(model, layers)
    observed = {path: _Observed(layer, modules[path]) for path, layer in layers.items()}
    lost, size = dict.fromkeys(observed, 0.0), dict.fromkeys(observed, 0.0)
    same: list[bool] = []
    divergences: list[float] = []
    for index, row in enumerate(rows):
        tokens = mx.array([list(row)])
        with _in_place(model, {**others, **observed}):
            expected = _log_probabilities(model(tokens))
            mx.eval(expected)
            for path, layer in observed.items():
                more_lost, more_size = layer.take()
                lost[path] += more_lost
                size[path] += more_size
        with _in_place(model, {**others, **modules}):
            actual = _log_probabilities(model(tokens))
        broken = [path for path in observed if not math.isfinite(lost[path] + size[path])]
        if problems := _not_finite(broken, expected, actual):
            raise InvalidAdapterError(source, problems)
        agrees = mx.argmax(expected, axis=-1) == mx.argmax(actual, axis=-1)
        # A token that the model rules out, by -inf, adds nothing.
        terms = mx.where(expected == -mx.inf, 0, mx.exp(expected) * (expected - actual))
        kl = mx.sum(terms, axis=-1)
        same += cast(list[bool], agrees.tolist())
        # Rounding may leave a divergence of nothing a little below it.
        divergences += cast(list[float], mx.maximum(kl, 0.0).tolist())
        progress(index + 1, len(rows))
    errors = {path: (lost[path] / size[path]) ** 0.5 for path in observed if size[path] > 0}
    worst = max(errors, key=lambda path: errors[path], default=None)
    return ActivationReport(
        prompts=len(rows),
        tokens=len(same),
        error_mean=sum(errors.values()) / len(errors) if errors else 0.0,
        error_worst=0.0 if worst is None else errors[worst],
        worst_module=None if worst is None or errors[worst] == 0 else worst,
        agreement=sum(same) / len(same),
        kl_mean=sum(divergences) / len(divergences),
        kl_max=max(divergences),
    )


def _not_finite(broken: Sequence[str], expected: mx.array, actual: mx.array) -> list[str]:
    """What is wrong with outputs of these layers, or with the log-probabilities of both models."""
    problems = []
    if broken:
        first, more = broken[0], f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        problems.append(f"{first}{more}: expected finite outputs on the prompts to compare, got others")
    for name, found in (("adapted", expected), ("fused", actual)):
        if mx.any(mx.isnan(found)).item():
            problems.append(f"the {name} model: expected finite logits on the prompts to compare, got others")
    if not problems and mx.any((expected > -mx.inf) & (actual == -mx.inf)).item():
        problems.append("the fused model: expected finite logits where the adapted one's are, got -inf")
    return problems


def _log_probabilities(logits: mx.array) -> mx.array:
    """(tokens, vocabulary), float32, of the logits (1, tokens, vocabulary)."""
    logits = logits[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@contextmanager
def _in_place(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    surgery = replace_modules(model, modules)
    try:
        yield
    finally:
        surgery.undo()
