"""A chat model that computes next to nothing: random weights under the demo's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs


@pytest.fixture(scope="session")
def tiny_model_path(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with two layers of width 32, float32."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(demo_model_path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps(config))
    keys = iter(mx.random.split(mx.random.key(7), 64))
    model = Model(ModelArgs.from_dict(config))
    parameters = dict(tree_flatten(model.parameters(), destination={}))
    weights = {
        name: mx.random.normal(value.shape, scale=0.3, key=next(keys)) if value.ndim == 2 else value
        for name, value in parameters.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder
