"""Which form of computing rows with adapters is the fastest on this device, measured on a model's own layers.

A form is chosen for each regime by itself. The adapters are random, lie in a bank of their own on the last
layers, and are gone afterwards: the model and MLX's random state are as before. Runs on the thread that owns
the model, while nothing else is computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from types import TracebackType
from typing import Self

import mlx.core as mx
import mlx.nn as nn

from .bank import AdapterBank
from .config import AdapterConfig, LoRAParameters
from .container import AdapterContainer
from .drawing import draw_tensors
from .formats.mlx import MlxFormat
from .layers.modules import ModuleKind, compute_dtype, kind_of, weight_shape
from .layers.targets import default_keys, module_at, named_modules
from .mixed.forms import MANY_ROWS, Form, Forms
from .mixed.residents import ResidentAdapter, RowAdapters, make_row
from .mixed.routing import AdapterRows, Routing
from .timing import fastest, in_turns

__all__ = ["REGIMES", "Calibration", "Regime", "calibrate", "compute_with"]

_LAYERS = 2
_RANKS = (8, 16, 32)
_REPEATS = 4  # forwards that are evaluated together, as those of many layers are
_FEWEST_TURNS, _MOST_TURNS = 5, 15


@dataclass(frozen=True, slots=True)
class Regime:
    """Batches that one form is chosen for, by a field of `Forms`: so many rows, and tokens of each."""

    name: str
    rows: int
    tokens: int


REGIMES = (
    Regime("decoding_few", MANY_ROWS // 2, 1),
    Regime("decoding_many", 2 * MANY_ROWS, 1),
    Regime("reading", 4, 64),
)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was found: the forms to compute with, and what each form took in each regime, in seconds.

    A regime for which the time did not suffice is missing from `seconds` and keeps the default.
    """

    forms: Forms
    seconds: dict[str, dict[str, float]]


def compute_with(routing: Routing, form: Form) -> None:
    """Have all regimes computed with `form`."""
    routing.forms = Forms.all(form)


def calibrate(
    model: nn.Module,
    forms: Sequence[Form],
    use: Callable[[Routing, Form], None] = compute_with,
    limit_seconds: float = 5.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Measure `forms`, the first being the default, for each of `REGIMES`; `use` is called before each run.

    The default stays where no other is faster by more than noise, and where `limit_seconds` are over; a
    measurement that has begun is finished.

    Raises: UnsupportedModelError, InvalidAdapterError: the model's layers cannot be adapted.
    """
    chosen = {regime.name: forms[0] for regime in REGIMES}
    seconds: dict[str, dict[str, float]] = {}
    if len(forms) == 1:
        return Calibration(Forms(**chosen), seconds)
    end = clock() + limit_seconds
    with _Sample(model, use, clock) as sample:
        for at, regime in enumerate(REGIMES):
            share = (end - clock()) / (len(REGIMES) - at)
            began = clock()
            runs = {form: sample.run(form, regime) for form in forms}
            for run in runs.values():
                run()  # what is compiled or planned at the first use
            one_turn = sum(run() for run in runs.values())
            left = share - (clock() - began)
            if one_turn * _FEWEST_TURNS > left:
                continue
            found = in_turns(runs, fewest=_FEWEST_TURNS, most=_MOST_TURNS, budget_seconds=left, clock=clock)
            chosen[regime.name] = fastest(found)
            seconds[regime.name] = {form: median(took) for form, took in found.items()}
    return Calibration(Forms(**chosen), seconds)


class _Sample:
    """The linear layers of a model's last layers with random adapters, one of each rank, until closed."""

    def __init__(
        self, model: nn.Module, use: Callable[[Routing, Form], None], clock: Callable[[], float]
    ) -> None:
        self._use = use
        self._clock = clock
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

    def run(self, form: Form, regime: Regime) -> Callable[[], float]:
        """What computes the layers with `form` for a batch of `regime`, and returns the seconds it took."""
        rows: list[RowAdapters] = [
            make_row([(self._adapters[row % len(self._adapters)], 1.0)]) for row in range(regime.rows)
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
            start = self._clock()
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
            return self._clock() - start

        return run


def _linear_keys(model: nn.Module) -> list[str]:
    """The linear layers of the model's layers, by their paths there."""
    modules = named_modules(model)
    linear = [path for path, module in modules if kind_of(module) is ModuleKind.LINEAR]
    return [key for key in default_keys(model) if any(path.endswith(f".{key}") for path in linear)]
