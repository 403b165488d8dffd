"""On every architecture: mixed rows, one at a time, and mlx-lm's own layers give the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
import pytest

from adapters_core.modules import ModuleKind, kind_of
from adapters_core.routing import RowAdapters
from adapters_core.targets import default_keys, named_base_modules
from tests.mixed.architectures import ARCHITECTURES, tiny
from tests.mixed.resident import Resident, alone, only
from tests.models import make_adapter, relative_error, snapshot, tokens

PROMPT, STEPS = 12, 3
QUANTISED = [(4, "affine"), (3, "affine")]


def paths_of(model: nn.Module, kind: ModuleKind) -> list[str]:
    return [path for path, module in named_base_modules(model) if kind_of(module) is kind]


def recipes(model: nn.Module) -> list[dict[str, Any]]:
    """Adapters of every kind of module that the model has, of several ranks and both types."""
    keys = default_keys(model)
    whole = [path for path in ("lm_head",) if path in dict(named_base_modules(model))]
    embeddings, switch = (paths_of(model, kind) for kind in (ModuleKind.EMBEDDING, ModuleKind.SWITCH))
    linear = [key for key in keys if not any(path.endswith(f".{key}") for path in switch)]
    found: list[dict[str, Any]] = [
        {"kind": "lora", "rank": 4, "keys": None, "size": 0.1},
        {"kind": "lora", "rank": 6, "keys": [*keys, *embeddings, *whole], "size": 0.1},
        {"kind": "dora", "rank": 4, "keys": linear, "size": 0.1},
        {"kind": "dora", "rank": 3, "keys": [*embeddings, *linear[:1]], "size": 0.1},
        {"kind": "lora", "rank": 4, "keys": None, "size": 0.1, "scale": 1.0},
    ]
    if switch:
        found.append({"kind": "lora", "rank": 4, "keys": [switch[0], *embeddings], "size": 0.2})
    return found


def folders_for(model: nn.Module, root: Path) -> list[Path]:
    return [
        make_adapter(root / str(seed), model, seed=seed, **recipe)
        for seed, recipe in enumerate(recipes(model))
    ]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_mixed_rows_equal_one_at_a_time_and_mlx_lm(name: str, tmp_path: Path) -> None:
    folders = folders_for(tiny(name), tmp_path)
    model = tiny(name)
    before = snapshot(model)
    resident = Resident(model)
    rows: list[RowAdapters] = [(), *(only(resident.add(folder)) for folder in folders), ()]
    inputs = tokens(len(rows), PROMPT)
    mixed = resident.logits(inputs, rows, STEPS)
    base = alone(tiny(name), None, inputs, STEPS)
    for row, folder in enumerate([None, *folders, None]):
        mine = inputs[row : row + 1]
        expected = base[row] if folder is None else alone(tiny(name), folder, mine, STEPS)[0]
        own = resident.logits(mine, rows[row : row + 1], STEPS)[0]
        assert relative_error(mixed[row], expected) < 1e-4
        assert relative_error(own, expected) < 1e-4
        assert np.array_equal(mixed[row, -STEPS:].argmax(-1), expected[-STEPS:].argmax(-1))
        assert folder is None or relative_error(expected, base[row]) > 1e-2, "no effect to be checked"
    resident.bank.close()
    assert snapshot(model) == before
