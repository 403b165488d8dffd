"""LoRA and DoRA of linear layers and embeddings over every quantisation of MLX, alone and as mixed rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from adapters_core.container import AdapterContainer
from adapters_core.layers.builders import dense_like
from adapters_core.layers.modules import dense_weight, is_quantized
from adapters_core.layers.surgery import replace_modules
from adapters_core.layers.targets import named_base_modules
from tests.mixed.resident import Resident, alone, only
from tests.models import make_adapter, relative_error, snapshot, tiny_llama, tokens

QUANTISATIONS = [(bits, "affine") for bits in (2, 3, 4, 5, 6, 8)] + [
    (4, "mxfp4"),
    (8, "mxfp8"),
    (4, "nvfp4"),
]
LINEAR = ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"]
EMBEDDING = ["model.embed_tokens"]


def quantised(bits: int, mode: str) -> Any:
    return tiny_llama(
        0,
        bits,
        mode=mode,
        group_size=16 if mode == "nvfp4" else 32,
        num_hidden_layers=1,
        tie_word_embeddings=True,
    )


def dense(bits: int, mode: str) -> Any:
    """A dense model of the same weights, over which mlx-lm's layers err in nothing."""
    model = quantised(bits, mode)
    plain: dict[str, Any] = {}
    for path, module in named_base_modules(model):
        if is_quantized(module):
            plain[path] = dense_like(module, dense_weight(module))
            plain[path].weight = dense_weight(module).astype(mx.float32)
    replace_modules(model, plain)
    return model


@pytest.mark.parametrize(("bits", "mode"), QUANTISATIONS)
def test_every_quantisation_gives_mlx_lms_answers_over_the_dense_weights(
    bits: int, mode: str, tmp_path: Path
) -> None:
    model = quantised(bits, mode)
    before = snapshot(model)
    folders = [
        make_adapter(tmp_path / f"{kind} {name}", model, kind, keys=keys, seed=seed, size=0.1)
        for seed, (name, keys) in enumerate([("linear", LINEAR), ("embedding", EMBEDDING)])
        for kind in ("lora", "dora")
    ]
    inputs = tokens(len(folders) + 1, 7)
    resident = Resident(model)
    rows = [*(only(resident.add(folder)) for folder in folders), ()]
    mixed = resident.logits(inputs, rows, 2)
    resident.bank.close()
    assert snapshot(model) == before
    base = alone(dense(bits, mode), None, inputs, 2)
    # Without float scales, what is looked up is bfloat16, and an embedding's change with it.
    bounds = {"linear": 1e-4, "embedding": 1e-4 if mode == "affine" else 1e-2}
    assert relative_error(mixed[-1], base[-1]) < 1e-4
    for row, folder in enumerate(folders):
        mine, bound = inputs[row : row + 1], bounds[folder.name.split()[1]]
        expected = alone(dense(bits, mode), folder, mine, 2)[0]
        assert relative_error(mixed[row], expected) < bound
        assert relative_error(base[row], expected) > 0.02, "no effect to be checked"
        container = AdapterContainer.from_directory(folder)
        container.load(into=model)
        own = alone(model, None, mine, 2)[0]
        container.unload(from_=model)
        assert relative_error(own, expected) < bound
        assert np.array_equal(own.argmax(-1), expected.argmax(-1)) or bound > 1e-4
    assert snapshot(model) == before
