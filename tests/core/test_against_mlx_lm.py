"""Layers, files and training against mlx-lm's own, as the reference."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma2, qwen2
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from adapters_core.config import AdapterConfig
from adapters_core.container import AdapterContainer
from adapters_core.layers.kinds import DoRALinear, LoRALinear, QDoRALinear, QLoRALinear
from tests.models import VOCABULARY, adapter_values, logits, make_adapter, relative_error, tiny_llama, tokens

KINDS = ["lora", "dora"]
ALL_LINEAR = None
QUANTISED = [(3, "affine"), (4, "affine"), (6, "affine"), (8, "affine"), (4, "mxfp4"), (8, "mxfp8")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize(("keys", "num_layers"), [(ALL_LINEAR, 2), (["self_attn.q_proj", "lm_head"], 16)])
def test_loaded_adapter_gives_the_logits_of_mlx_lm(
    tmp_path: Path, kind: str, bits: int | None, keys: list[str] | None, num_layers: int
) -> None:
    ours, theirs = tiny_llama(0, bits), tiny_llama(0, bits)
    folder = make_adapter(tmp_path / "a", ours, kind, keys=keys, num_layers=num_layers)
    base = logits(ours)

    AdapterContainer.from_directory(folder).load(into=ours)
    load_adapters(theirs, str(folder))
    theirs.eval()

    assert relative_error(logits(ours), logits(theirs)) < 1e-4
    assert relative_error(logits(ours), base) > 0.01
    kinds = {type(module) for module in ours.modules() if isinstance(module, LoRALinear | DoRALinear)}
    expected = {"lora": (LoRALinear, QLoRALinear), "dora": (DoRALinear, QDoRALinear)}[kind]
    assert kinds == {expected[bits is not None]}


@pytest.mark.parametrize(("bits", "mode"), QUANTISED)
def test_lora_over_every_quantisation_gives_the_logits_of_mlx_lm(
    tmp_path: Path, bits: int, mode: str
) -> None:
    ours, theirs = (tiny_llama(3, bits, mode=mode) for _ in range(2))
    folder = make_adapter(tmp_path / "a", ours, keys=None)
    AdapterContainer.from_directory(folder).load(into=ours)
    load_adapters(theirs, str(folder))
    theirs.eval()
    assert relative_error(logits(ours), logits(theirs)) < 1e-4


@pytest.mark.parametrize("num_layers", [-1, 0, 1, 2, 3, 16])
@pytest.mark.parametrize("keys", [None, ["self_attn.v_proj"], ["mlp.up_proj", "lm_head"]])
def test_an_adapter_saved_by_mlx_lm_is_the_one_that_we_expect(
    tmp_path: Path, num_layers: int, keys: list[str] | None
) -> None:
    values = adapter_values("dora", num_layers=num_layers, keys=keys)
    config = AdapterConfig.from_values(values, "test")
    theirs, ours = tiny_llama(0), tiny_llama(0)
    theirs.freeze()
    linear_to_lora_layers(theirs, num_layers, values["lora_parameters"], use_dora=True)
    config.write(tmp_path / "adapter_config.json")
    tensors = dict(tree_flatten(theirs.trainable_parameters()))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), tensors)
    AdapterContainer.from_directory(tmp_path).check(ours)
    container = AdapterContainer.from_model(ours, config)
    assert {name: array.shape for name, array in container.parameters.items()} == {
        name: array.shape for name, array in tensors.items()
    }


def _other_architectures() -> list[nn.Module]:
    common = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "head_dim": 8,
    }
    qwen = {name: value for name, value in common.items() if name != "head_dim"}
    models: list[nn.Module] = [
        gemma2.Model(gemma2.ModelArgs(model_type="gemma2", **common)),
        qwen2.Model(qwen2.ModelArgs(model_type="qwen2", **qwen)),
    ]
    for model in models:
        mx.eval(model.parameters())
        model.eval()
    return models


@pytest.mark.parametrize("which", [0, 1])
def test_other_architectures_give_the_logits_of_mlx_lm(tmp_path: Path, which: int) -> None:
    mx.random.seed(5)
    ours = _other_architectures()[which]
    mx.random.seed(5)
    theirs = _other_architectures()[which]
    folder = make_adapter(tmp_path / "a", ours, keys=None, size=0.1)
    AdapterContainer.from_directory(folder).load(into=ours)
    load_adapters(theirs, str(folder))
    theirs.eval()
    assert relative_error(logits(ours), logits(theirs)) < 1e-4


class _Losses(TrainingCallback):
    """The training losses that mlx-lm reports."""

    def __init__(self) -> None:
        self.train: list[float] = []

    def on_train_loss_report(self, train_info: dict[str, float]) -> None:
        self.train.append(train_info["train_loss"])

    def on_val_loss_report(self, val_info: dict[str, float]) -> None:
        del val_info


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 4])
def test_training_with_mlx_lm_learns_and_the_saved_folder_loads_in_mlx_lm(
    tmp_path: Path, kind: str, bits: int | None
) -> None:
    model, fresh = tiny_llama(0, bits), tiny_llama(0, bits)
    base = logits(model)
    config = AdapterConfig.from_values(adapter_values(kind, keys=None, num_layers=2), "test")
    container = AdapterContainer.from_model(model, config)
    trainable = dict(tree_flatten(model.trainable_parameters()))
    assert trainable.keys() == container.parameters.keys()
    assert relative_error(logits(model), base) < 1e-5
    before = container.digest

    data = [(list(range(start, start + 12)), 0) for start in range(1, 9)]
    losses = _Losses()
    np.random.seed(0)  # the order of the trainer's batches
    train(
        model,
        optim.Adam(learning_rate=1e-2),
        data,
        data,
        args=TrainingArgs(
            batch_size=4,
            iters=16,
            val_batches=1,
            steps_per_report=4,
            steps_per_eval=100,
            steps_per_save=100,
            max_seq_length=32,
            adapter_file=str(tmp_path / "checkpoint.safetensors"),
        ),
        training_callback=losses,
    )

    assert losses.train[-1] < 0.9 * losses.train[0]
    assert container.digest != before
    model.eval()
    trained = logits(model)
    container.save(tmp_path / "saved")
    load_adapters(fresh, str(tmp_path / "saved"))
    fresh.eval()
    assert relative_error(logits(fresh), trained) < (1e-4 if kind == "dora" else 1e-12)
    reread = AdapterContainer.from_directory(tmp_path / "saved")
    assert reread.digest == container.digest
    container.unload(from_=model)
    np.testing.assert_array_equal(logits(model), base)
    reread.load(into=model)
    np.testing.assert_array_equal(logits(model), trained)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [None, 4])
def test_gradients_are_those_of_mlx_lm(tmp_path: Path, kind: str, bits: int | None) -> None:
    ours, theirs = tiny_llama(0, bits), tiny_llama(0, bits)
    folder = make_adapter(tmp_path / "a", ours, kind)
    AdapterContainer.from_directory(folder).load(into=ours)
    load_adapters(theirs, str(folder))
    inputs, outputs = tokens(2, 8), tokens(2, 8, seed=8)
    gradients = []
    for model in (ours, theirs):
        model.freeze()
        model.unfreeze(keys=["lora_a", "lora_b", "m"])
        model.train()

        def loss(model: nn.Module) -> mx.array:
            return nn.losses.cross_entropy(model(inputs), outputs, reduction="mean")

        gradients.append(dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1])))
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 9 * (2 if kind == "lora" else 3)
    for name, gradient in gradients[0].items():
        assert relative_error(np.array(gradient), np.array(gradients[1][name])) < 1e-4
