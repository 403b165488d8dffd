"""Models whose query, key and value are one weight with three outputs: fused, saved, and loaded by mlx-lm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx_lm.models.afm7 import FusedLinear, FusedQuantizedLinear
from mlx_lm.utils import load_model, save_model

from adapters_core.container import AdapterContainer
from adapters_core.fusing.fusion import Precision
from server.adapters.saving.models import config_of
from tests.mixed.architectures import tiny
from tests.models import make_adapter, tokens

AFM = "afm7, split query, key and value"


@pytest.mark.parametrize(
    ("bits", "precision"), [(None, "auto"), (4, "auto"), (4, "requantize"), (4, "dequantize")]
)
def test_a_saved_model_is_mlx_lms(bits: int | None, precision: Precision, tmp_path: Path) -> None:
    model: Any = tiny(AFM, bits)
    config = {**vars(model.args)}
    if bits is not None:
        usual = {"group_size": 32, "bits": bits}
        paths = [f"model.layers.{at}.self_attn.qkv_proj" for at in range(len(model.model.layers))]
        config["quantization"] = {**usual, "mode": "affine", **dict.fromkeys(paths, usual)}
    container = AdapterContainer.from_directory(make_adapter(tmp_path / "a", model, keys=None, size=0.1))
    container.fuse(with_=model, precision=precision)
    folder = tmp_path / "fused"
    save_model(folder, model, donate_model=False)
    (folder / "config.json").write_text(json.dumps(config_of(config, model)))
    loaded: Any = load_model(folder)[0]
    loaded.eval()
    inputs = tokens(2, 9)
    assert np.array_equal(np.array(loaded(inputs)), np.array(model(inputs)))
    kinds = {type(layer.self_attn.qkv_proj) for layer in loaded.model.layers}
    assert kinds == {FusedLinear if bits is None or precision == "dequantize" else FusedQuantizedLinear}
