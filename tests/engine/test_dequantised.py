"""A quantised model in float32 on a CPU computes the same with dense weights, whatever its layers are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import save_model

from server.adapters.saving.models import config_of
from server.engine.model import load_model
from tests.adapters.support import write_model
from tests.mixed.architectures import tiny
from tests.models import relative_error, tokens


@pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="on a GPU it stays quantised")
@pytest.mark.parametrize("name", ["afm7, split query, key and value", "mixtral, tied head"])
def test_a_quantised_model_in_float32_has_dense_weights(name: str, tmp_path: Path) -> None:
    model: Any = tiny(name, 4)
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_model(folder, model, donate_model=False)
    usual = {"group_size": 32, "bits": 4, "mode": "affine"}
    config = config_of({**vars(model.args), "quantization": usual}, model)
    (folder / "config.json").write_text(json.dumps(config))
    loaded: Any = load_model(str(folder), dtype="float32").model
    quantised = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    assert not any(isinstance(module, quantised) or "scales" in module for module in loaded.modules())
    inputs = tokens(2, 9)
    assert relative_error(np.array(loaded(inputs)), np.array(model(inputs))) < 1e-5
