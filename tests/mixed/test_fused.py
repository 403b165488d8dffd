"""What the host does around the fused kernel, with a stand-in that computes what it does on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from adapters_core.bank import AdapterBank
from adapters_core.container import AdapterContainer
from adapters_core.mixed.kernel import Kernels
from adapters_core.mixed.kernel_source import kernel_source
from adapters_core.mixed.layout import GroupLayout
from adapters_core.mixed.residents import ResidentAdapter, RowAdapters, make_row
from adapters_core.mixed.routing import RoutedModel, Routing
from tests.mixed.architectures import tiny
from tests.mixed.resident import Resident, only
from tests.models import make_adapter, relative_error, tiny_llama, tokens

ALL = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


class StandIn(Kernels):
    """Plain products of what a kernel is given, so that a CPU can run all but the kernel itself."""

    def __init__(self, compiles: bool) -> None:
        super().__init__(compiles)
        self.traces = 0

    def get(self, layout: GroupLayout, dtype: mx.Dtype) -> Callable[..., Sequence[mx.array]]:
        name, *_ = kernel_source(layout, dtype, 256, 8, clusters=True)
        return self._made.setdefault(name, self._stand_in(layout))

    def _stand_in(self, layout: GroupLayout) -> Callable[..., Sequence[mx.array]]:
        places = range(len(layout.projections))
        ranks, bs, factors = (list(part.values()) for part in (layout.ranks, layout.b, layout.factors))

        def kernel(inputs: list[mx.array], output_shapes: list[Any], **_: Any) -> list[mx.array]:
            self.traces += 1
            x, slab, packed, *ys = inputs
            assert [tuple(y.shape) for y in ys] == output_shapes
            concerned = (packed[:, 0] >= 0)[:, None, None]
            rows = slab[mx.maximum(packed[:, 0], 0)]
            a = rows[:, : layout.rank * layout.in_size].reshape(-1, layout.rank, layout.in_size)
            h = (x.astype(slab.dtype) @ a.swapaxes(-1, -2)) * packed[:, 1:, None].view(mx.float32)
            outputs = []
            for at, p, y in zip(places, layout.projections, ys, strict=True):
                b = rows[:, bs[at]].reshape(-1, p.rank, p.out_size)
                new = y + (h[..., ranks[at]] @ b).astype(y.dtype)
                if layout.is_dora:
                    new = rows[:, factors[at]][:, None, :].astype(y.dtype) * new
                outputs.append(mx.where(concerned, new, y))
            return outputs

        return kernel


class Served:
    """A model with adapters of four layouts, and its logits of one token for given rows."""

    def __init__(self, root: Path, model: nn.Module) -> None:
        self.routing = Routing()
        self.bank = AdapterBank(model, self.routing)
        self.routed = RoutedModel(model, self.routing)
        recipes: list[dict[str, Any]] = [
            {"kind": "lora", "rank": 4},
            {"kind": "lora", "rank": 8, "keys": ALL, "scale": 0.7},
            {"kind": "dora", "rank": 4},
            {"kind": "dora", "rank": 8, "keys": ALL},
        ]
        self.adapters = [
            self.add(make_adapter(root / str(seed), model, seed=seed, **recipe))
            for seed, recipe in enumerate(recipes * 2)
        ]

    def add(self, folder: Path) -> ResidentAdapter:
        return self.bank.add(AdapterContainer.from_directory(folder))

    def logits(self, kernels: Kernels | None, rows: Sequence[RowAdapters], steps: int = 1) -> np.ndarray:
        self.routing.kernels = kernels
        caches = [self.routed.new_cache(row) for row in rows]
        merged = [entries[0].merge(list(entries)) for entries in zip(*caches, strict=True)]
        found = [
            self.routed(tokens(len(rows), 1, seed=step), cache=merged).astype(mx.float32)
            for step in range(steps)
        ]
        return np.array(mx.concatenate(found, axis=1))


def rows_of(adapters: Sequence[ResidentAdapter]) -> list[RowAdapters]:
    blend = make_row([(adapters[0], 0.5), (adapters[1], -0.3), (adapters[4], 0.8)])
    return [(), *(make_row([(adapter, 1.0)]) for adapter in adapters), blend, ()]


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_kernel_calls_compute_what_the_products_do(compiles: bool, bits: int | None, tmp_path: Path) -> None:
    served = Served(tmp_path, tiny_llama(0, bits, attention_bias=False, mlp_bias=False))
    rows = rows_of(served.adapters)
    kernels = StandIn(compiles)
    found = served.logits(kernels, rows, steps=3)
    assert kernels.traces > 0
    assert relative_error(found, served.logits(None, rows, steps=3)) < 1e-5


def test_layers_of_one_form_share_a_compiled_function(tmp_path: Path) -> None:
    served = Served(tmp_path, tiny_llama(attention_bias=False, mlp_bias=False))
    kernels = StandIn(compiles=True)
    rows = [make_row([(served.adapters[1], 1.0)])] * 2
    served.logits(kernels, rows, steps=4)
    assert kernels.traces == 4, (
        "query with key and value, output, gate with up, down: of all layers and steps"
    )


@pytest.mark.parametrize("bits", [None, 4])
def test_a_layer_with_several_outputs_is_one_layer_to_the_kernel(bits: int | None, tmp_path: Path) -> None:
    resident = Resident(tiny("afm7, split query, key and value", bits))
    adapters = [
        resident.add(
            make_adapter(
                tmp_path / str(seed), resident.model, keys=["self_attn.qkv_proj"], seed=seed, rank=rank
            )
        )
        for seed, rank in ((1, 4), (2, 4), (3, 6))
    ]
    rows, inputs = [(), *map(only, adapters)], tokens(4, 1)
    resident.routing.kernels = None  # a stack would keep the real ones, where there are any
    expected = resident.logits(inputs, rows, 2)
    kernels = resident.routing.kernels = StandIn(compiles=True)
    assert relative_error(resident.logits(inputs, rows, 2), expected) < 1e-5
    assert kernels.traces > 0


def test_where_the_kernel_cannot_the_products_do(tmp_path: Path) -> None:
    served = Served(tmp_path, tiny_llama())
    kernels = StandIn(compiles=True)
    rows = [make_row([(served.adapters[3], 1.0)])] * 2
    with_bias = served.logits(kernels, rows)
    assert kernels.traces == 0
    assert relative_error(with_bias, served.logits(None, rows)) < 1e-6
