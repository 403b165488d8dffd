"""Which form of computing rows with adapters is the fastest on this device, measured on a model's own layers.

A form is chosen for each regime by itself. The adapters are random, lie in a bank of their own on the last
layers, and are gone afterwards: the model and MLX's random state are as before. Runs on the thread that owns
the model, while nothing else is computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

import mlx.core as mx
import mlx.nn as nn

from .bank import AdapterBank
from .config import AdapterConfig, LoRAParameters
from .container import AdapterContainer
from .drawing import draw_tensors
from .formats.mlx import MlxFormat
from .layers.modules import ModuleKind, compute_dtype, kind_of, weight_shape
from .layers.targets import default_keys, module_at, named_modules
from .mixed.residents import ResidentAdapter, RowAdapters, make_row
from .mixed.routing import AdapterRows, Routing
from .timing import fastest, in_turns

__all__ = ["REGIMES", "Calibration", "Regime", "calibrate"]

_F = TypeVar("_F")

_LAYERS = 2
_RANKS = (8, 16, 32)
_REPEATS = 4  # forwards that are evaluated together, as those of many layers are
_FEWEST_TURNS, _MOST_TURNS = 5, 15


@dataclass(frozen=True, slots=True)
class Regime:
    """Batches that one form is chosen for: `rows` that each have `tokens`, of adapters of `ranks` ranks."""

    name: str
    rows: int
    tokens: int
    ranks: int


REGIMES = (
    Regime("decoding 1 row", 1, 1, 1),
    Regime("decoding 8 rows", 8, 1, 3),
    Regime("decoding 32 rows", 32, 1, 3),
    Regime("reading", 4, 64, 3),
)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was found: by regime, the name of the form that is used, and what each took, in seconds.

    A regime for which the time did not suffice is missing from `seconds` and keeps the first form.
    """

    chosen: dict[str, str]
    seconds: dict[str, dict[str, float]]


def calibrate(
    model: nn.Module,
    forms: Mapping[str, _F],
    use: Callable[[Routing, _F], None],
    regimes: Sequence[Regime] = REGIMES,
    limit_seconds: float = 5.0,
) -> Calibration:
    """Measure `forms`, by name, the first being the default, for each of `regimes`.

    `use` makes a routing compute with a form. The default stays where no other is faster by more than noise,
    and where `limit_seconds` are over; a measurement that has begun is finished.

    Raises: UnsupportedModelError, InvalidAdapterError: the model's layers cannot be adapted.
    """
    default = next(iter(forms))
    chosen, seconds = {one.name: default for one in regimes}, {}
    if len(forms) == 1:
        return Calibration(chosen, seconds)
    end = time.perf_counter() + limit_seconds
    with _Sample(model, use) as sample:
        for regime in regimes:
            share = (end - time.perf_counter()) / (len(regimes) - len(seconds))
            runs = {name: sample.run(form, regime) for name, form in forms.items()}
            began = time.perf_counter()
            for run in runs.values():
                run()  # what is compiled or planned at the first use
                if time.perf_counter() > end:
                    return Calibration(chosen, seconds)
            one_turn = sum(run() for run in runs.values())
            if one_turn * _FEWEST_TURNS > share - (time.perf_counter() - began):
                continue
            found = in_turns(runs, fewest=_FEWEST_TURNS, most=_MOST_TURNS, budget_seconds=share / 2)
            chosen[regime.name] = fastest(found)
            seconds[regime.name] = {name: sorted(took)[len(took) // 2] for name, took in found.items()}
    return Calibration(chosen, seconds)


class _Sample(Generic[_F]):
    """The linear layers of a model's last layers with random adapters, one of each rank, until closed."""

    def __init__(self, model: nn.Module, use: Callable[[Routing, _F], None]) -> None:
        self._use = use
        self._routing = Routing()
        self._bank = AdapterBank(model, self._routing)
        keys = _linear_keys(model)
        self._adapters: list[ResidentAdapter] = []
        try:
            for seed, rank in enumerate(_RANKS if keys else ()):
                parameters = LoRAParameters(rank=rank, keys=keys)
                config = AdapterConfig(num_layers=_LAYERS, lora_parameters=parameters)
                content = MlxFormat(config, draw_tensors(model, config, seed))
                self._adapters.append(self._bank.add(AdapterContainer(content, "calibration")))
        except BaseException:
            self._bank.close()
            raise
        wrapped = dict(named_modules(model))
        paths = self._adapters[0].paths if self._adapters else ()
        self._layers = [(wrapped[path], module_at(model, path)) for path in paths]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._layers.clear()
        self._bank.close()

    def run(self, form: _F, regime: Regime) -> Callable[[], float]:
        """What computes the layers with `form` for a batch of `regime`, and returns the seconds it took."""
        adapters = self._adapters[: regime.ranks]
        rows: list[RowAdapters] = [
            make_row([(adapters[row % len(adapters)], 1.0)]) for row in range(regime.rows)
        ]
        batch = AdapterRows(rows)
        inputs: dict[tuple[int, mx.Dtype], mx.array] = {}
        for _, base in self._layers:
            size, dtype = weight_shape(base)[-1], compute_dtype(base)
            x = mx.random.normal((regime.rows, regime.tokens, size), key=mx.random.key(size))
            inputs[size, dtype] = x.astype(dtype)
        mx.eval(list(inputs.values()))
        given = [inputs[weight_shape(base)[-1], compute_dtype(base)] for _, base in self._layers]

        def run() -> float:
            start = time.perf_counter()
            self._use(self._routing, form)
            outputs: list[mx.array] = []
            for _ in range(_REPEATS):
                plan = self._routing.plan = batch.plan(self._routing)
                if plan is None:
                    return 0.0
                plan.length = regime.tokens
                outputs += [layer(x) for (layer, _), x in zip(self._layers, given, strict=True)]
                self._routing.plan = None
                plan.memo.clear()
            mx.eval(outputs)
            return time.perf_counter() - start

        return run


def _linear_keys(model: nn.Module) -> list[str]:
    """The linear layers of the model's layers, by their paths there."""
    modules = named_modules(model)
    linear = [path for path, module in modules if kind_of(module) is ModuleKind.LINEAR]
    return [key for key in default_keys(model) if any(path.endswith(f".{key}") for path in linear)]
