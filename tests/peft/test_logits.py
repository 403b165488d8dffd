"""PEFT folders compute what PEFT computes with them: loaded into a model, and as rows of one batch."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from adapters_core.bank import AdapterBank
from adapters_core.container import AdapterContainer
from adapters_core.mixed.residents import make_row
from adapters_core.mixed.routing import RoutedModel, Routing
from tests.models import snapshot
from tests.peft import fixtures

TOLERANCE = 1e-4


def _logits(model: nn.Module) -> np.ndarray:
    return np.array(model(fixtures.tokens()).astype(mx.float32))


@pytest.mark.parametrize("name", fixtures.ADAPTERS)
def test_a_loaded_folder_equals_peft_and_leaves_no_trace(name: str) -> None:
    model = fixtures.model(fixtures.base_of(name))
    before, base = snapshot(model), _logits(model)
    container = AdapterContainer.from_directory(fixtures.adapter(name))
    container.load(into=model)
    np.testing.assert_allclose(_logits(model), fixtures.expected(name), atol=TOLERANCE, rtol=0)
    container.unload(from_=model)
    assert snapshot(model) == before
    assert np.abs(fixtures.expected(name) - base).max() > 100 * TOLERANCE


@pytest.mark.parametrize("base", sorted({fixtures.base_of(name) for name in fixtures.ADAPTERS}))
def test_rows_with_different_folders_in_one_batch_equal_peft(base: str) -> None:
    names = [name for name in fixtures.ADAPTERS if fixtures.base_of(name) == base]
    model = fixtures.model(base)
    plain = _logits(model)
    routing = Routing()
    bank, routed = AdapterBank(model, routing), RoutedModel(model, routing)
    residents = [bank.add(AdapterContainer.from_directory(fixtures.adapter(name))) for name in names]
    assert {resident.format for resident in residents} == {"peft"}
    rows = [make_row([]), *(make_row([(resident, 1.0)]) for resident in residents)]
    for number, token_row in enumerate(fixtures.tokens()):
        caches = [routed.new_cache(row) for row in rows]
        merged = [entries[0].merge(list(entries)) for entries in zip(*caches, strict=True)]
        inputs = mx.broadcast_to(token_row, (len(rows), token_row.size))
        mixed = np.array(routed(inputs, cache=merged).astype(mx.float32))
        wanted = [plain[number], *(fixtures.expected(name)[number] for name in names)]
        for row, logits in zip(mixed, wanted, strict=True):
            np.testing.assert_allclose(row, logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        "patterns",
        "dora",
        "bias",
        "bias-of-both",
        "embedding",
        "embedding-dora",
        "tied",
        "tokens",
        "tokens-head",
        "tokens-dora",
        "saved-rows",
        "saved-tied",
        "experts-qwen3",
    ],
)
def test_a_fused_folder_equals_peft_and_can_be_undone(name: str) -> None:
    model = fixtures.model(fixtures.base_of(name))
    before = snapshot(model)
    fusion = AdapterContainer.from_directory(fixtures.adapter(name)).fuse(with_=model)
    np.testing.assert_allclose(_logits(model), fixtures.expected(name), atol=TOLERANCE, rtol=0)
    fusion.undo()
    assert snapshot(model) == before
