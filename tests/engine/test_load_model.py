"""Loading a model folder: dtypes, what is known of it, and one sentence for whatever cannot be served."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama4
from mlx_lm.utils import save_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapters_core.errors import UnsupportedModelError
from server.engine.errors import ModelLoadError
from server.engine.model import UNLIMITED_TOKENS, LoadedModel, load_model
from tests.models import VOCABULARY, logits, relative_error, tiny_llama

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "eos_token_id": 3,
}


def write_model(folder: Path, model: nn.Module | None = None, **config: Any) -> Path:
    """A complete model folder of `tiny_llama`, or of `model`; None as a value leaves a key out."""
    save_model(folder, model or tiny_llama())
    values = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w3").save_pretrained(folder)
    return folder


def dtypes(loaded: LoadedModel) -> set[mx.Dtype]:
    parameters: Any = tree_flatten(loaded.model.parameters())
    return {array.dtype for _, array in parameters}


def test_a_folder_is_loaded_with_what_there_is_to_know(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "Some-Model-1B")
    told: list[str] = []
    loaded = load_model(str(folder), progress=told.append)
    info = loaded.info
    assert info.model_id == "Some-Model-1B"
    assert info.path == folder
    assert (info.context_tokens, info.vocabulary_tokens) == (512, VOCABULARY)
    assert info.config["hidden_size"] == 64
    assert info.tokenizer.eos_token_ids == {3}
    assert info.tokenizer.decode([5, 7]) == "w5 w7"
    assert told == [f"loading {folder}"]
    assert not loaded.model.training
    np.testing.assert_array_equal(logits(loaded.model), logits(tiny_llama()))


def test_a_relative_folder_is_named_by_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_model(tmp_path / "named"))
    assert load_model(".").info.model_id == "named"


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({}, 512),
        ({"max_position_embeddings": None, "n_positions": 99}, 99),
        ({"max_position_embeddings": None, "text_config": {"max_position_embeddings": 77}}, 77),
        ({"max_position_embeddings": None}, UNLIMITED_TOKENS),
    ],
)
def test_the_context_comes_from_the_config(tmp_path: Path, config: dict[str, Any], tokens: int) -> None:
    assert load_model(str(write_model(tmp_path / "m", **config))).info.context_tokens == tokens


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("auto", mx.float32), ("float32", mx.float32), ("bfloat16", mx.bfloat16), ("float16", mx.float16)],
)
def test_dense_weights_get_the_dtype_asked_for(tmp_path: Path, dtype: Any, expected: mx.Dtype) -> None:
    model = tiny_llama()
    model.set_dtype(mx.float16)
    loaded = load_model(str(write_model(tmp_path / "m", model)), dtype=dtype)
    assert dtypes(loaded) == {expected}


@pytest.mark.parametrize(
    ("dtype", "scales", "quantised"),
    [
        ("auto", mx.float32, True),
        ("float32", mx.float32, False),
        ("bfloat16", mx.bfloat16, True),
        ("float16", mx.float16, True),
    ],
)
def test_quantised_weights_stay_so_unless_float32_is_asked_for_on_a_cpu(
    tmp_path: Path, dtype: Any, scales: mx.Dtype, quantised: bool
) -> None:
    model: Any = tiny_llama(quantize_bits=4)
    folder = write_model(tmp_path / "m", model, quantization={"group_size": 32, "bits": 4})
    loaded = load_model(str(folder), dtype=dtype)
    assert dtypes(loaded) == ({scales, mx.uint32} if quantised else {mx.float32})
    kinds = {type(module) for _, module in loaded.model.named_modules()}
    assert (nn.QuantizedLinear in kinds) == quantised
    assert (nn.Linear in kinds) != quantised
    assert relative_error(logits(loaded.model), logits(model)) < (1e-5 if scales == mx.float32 else 0.05)


def test_the_digest_tells_bases_apart(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    first = load_model(str(folder)).info.digest
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", first)
    assert load_model(str(folder)).info.digest == first
    others = [
        load_model(str(folder), dtype="bfloat16").info.digest,
        load_model(str(write_model(tmp_path / "rope", rope_theta=500.0))).info.digest,
        load_model(str(write_model(tmp_path / "weights", tiny_llama(seed=1)))).info.digest,
    ]
    assert len({first, *others}) == 4


# What cannot be served


@pytest.mark.parametrize("config", [{"auto_map": {"AutoModel": "code.Model"}}, {"model_file": "code.py"}])
def test_a_model_with_code_of_its_own_is_refused_and_the_code_not_run(tmp_path: Path, config: Any) -> None:
    witness = tmp_path / "ran"
    folder = write_model(tmp_path / "m", **config)
    (folder / "code.py").write_text(f"open({str(witness)!r}, 'w')")
    with pytest.raises(ModelLoadError, match=f"run code of its own.*{next(iter(config))}"):
        load_model(str(folder))
    assert not witness.exists()


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def spoil_config_kind(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def spoil_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"nonsense")


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lose_a_tensor(folder: Path) -> None:
    weights: Any = mx.load(str(folder / "model.safetensors"))
    weights.pop("lm_head.weight")
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def lose_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": "no_such_model"}))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_config, "not a model folder"),
        (spoil_config, "cannot be read as JSON"),
        (spoil_config_kind, "must hold an object, got list"),
        (spoil_weights, "cannot be loaded"),
        (lose_weights, "cannot be loaded"),
        (lose_a_tensor, "cannot be loaded.*lm_head"),
        (lose_tokenizer, "cannot be loaded"),
        (unknown_type, "cannot be loaded.*no_such_model"),
    ],
)
def test_what_is_not_a_model_is_refused_in_one_sentence(tmp_path: Path, spoil: Any, message: str) -> None:
    folder = write_model(tmp_path / "m")
    spoil(folder)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./nothing", "nothing", "a/b/c", "~/no-such-folder-here"]
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(name: str) -> None:
    with pytest.raises(ModelLoadError, match="there is no folder"):
        load_model(name)


def test_a_file_and_a_revision_of_a_folder_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    with pytest.raises(ModelLoadError, match="is a file"):
        load_model(str(folder / "config.json"))
    with pytest.raises(ModelLoadError, match="leave it out"):
        load_model(str(folder), revision="main")


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path: Path) -> None:
    code = (
        "from server.blas import load_openblas; load_openblas()\n"
        "from server.engine.model import load_model\n"
        "from server.engine.errors import ModelLoadError\n"
        "try: load_model('somebody/some-model', progress=print)\n"
        "except ModelLoadError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    fetching, sentence = done.stdout.strip().splitlines()
    assert fetching == "fetching somebody/some-model"
    assert "'somebody/some-model' cannot be fetched" in sentence


def test_an_id_that_no_hub_would_take_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="neither a folder nor a valid hub id"):
        load_model("--bad--/..name..")


def test_caches_that_cannot_be_batched_are_refused_by_name(tmp_path: Path) -> None:
    config = {
        "model_type": "llama4",
        "text_config": {
            "attention_bias": False,
            "attention_chunk_size": 64,
            "head_dim": 16,
            "hidden_act": "silu",
            "hidden_size": 32,
            "interleave_moe_layer_step": 2,
            "intermediate_size": 32,
            "intermediate_size_mlp": 32,
            "max_position_embeddings": 512,
            "model_type": "llama4_text",
            "num_attention_heads": 2,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "num_local_experts": 2,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "use_qk_norm": False,
            "vocab_size": VOCABULARY,
        },
    }
    model = llama4.Model(llama4.ModelArgs.from_dict(config))
    folder = write_model(tmp_path / "m", model)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="ChunkedKVCache"):
        load_model(str(folder))
