"""Linear layers with several outputs, a LoRA for each: mlx-lm's own layers, choices, files and failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.afm7 import FusedLinear
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from adapters_core.blending.blend import BlendOptions, BlendPart, blend
from adapters_core.config import AdapterConfig
from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError
from adapters_core.formats.unplaced import read_unplaced
from adapters_core.formats.writing import write_adapter
from adapters_core.fusing.activations import compare_activations
from adapters_core.fusing.fusion import Precision
from adapters_core.fusing.sums import summed
from adapters_core.layers.builders import dense_like
from adapters_core.layers.module_weights import ModuleWeights
from adapters_core.layers.modules import ModuleKind, dense_weight, kind_of, output_sizes
from adapters_core.layers.split import LoRASplitLinear
from adapters_core.layers.targets import default_keys, resolve_targets
from tests.mixed.architectures import tiny
from tests.mixed.resident import Resident, alone, only
from tests.models import adapter_tensors, adapter_values, make_adapter, relative_error, snapshot, tokens
from tests.models import write_adapter as write_tensors

AFM = "afm7, split query, key and value"
SIZES, DIMS, RANK = [32, 16, 16], 64, 3
QKV = "model.layers.1.self_attn.qkv_proj"
DOWN = "model.kv_reuse_layers.0.mlp.down_proj"


def base(bits: int | None = None) -> Any:
    mx.random.seed(3)
    linear = FusedLinear(DIMS, SIZES)
    return linear if bits is None else linear.to_quantized(32, bits)


def random(*shape: int, seed: int = 5) -> mx.array:
    return 0.3 * mx.random.normal(shape, key=mx.random.key(seed))


def pairs(seed: int = 1) -> list[tuple[mx.array, mx.array]]:
    return [
        (random(DIMS, RANK, seed=seed + at), random(RANK, size, seed=seed + 7 * at))
        for at, size in enumerate(SIZES)
    ]


def bits_of(weights: dict[str, ModuleWeights]) -> dict[str, list[Any]]:
    return {
        path: [
            one.scale,
            len(one.parts),
            *(np.array(factor).tobytes() for pair in one.pairs for factor in pair),
        ]
        for path, one in weights.items()
    }


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_layer_is_mlx_lms(bits: int | None) -> None:
    linear = base(bits)
    ours = LoRASplitLinear(linear, ModuleWeights.of_parts(pairs(), 0.7), 0.0)
    their = linear.to_lora(r=RANK, scale=0.7)
    their.lora_a, their.lora_b = (list(factors) for factors in zip(*pairs(), strict=True))
    x = random(2, 5, DIMS)
    for found, expected, size in zip(ours(x), their(x), SIZES, strict=True):
        assert found.shape == (2, 5, size)
        assert mx.array_equal(found, expected).item()
    assert [name for name, _ in tree_flatten(ours.parameters())] == [
        name for name, _ in tree_flatten(their.parameters())
    ]
    fused: Any = ours.fused()
    assert type(fused) is type(linear)
    assert relative_error(np.array(dense_weight(fused)), np.array(dense_weight(their.fuse()))) < 1e-5
    dense: Any = dense_like(linear, ours.fused_weight())
    assert kind_of(dense) is kind_of(fused) is ModuleKind.SPLIT
    assert dense.output_dims == fused.output_dims == SIZES
    for merged, adapted in zip(dense(x), ours(x), strict=True):
        assert relative_error(np.array(merged), np.array(adapted)) < 1e-5


@pytest.mark.parametrize("bits", [None, 4])
def test_loras_of_all_outputs_are_one_whose_b_is_block_diagonal(bits: int | None) -> None:
    linear, weights, x = base(bits), ModuleWeights.of_parts(pairs(), 0.7), random(2, 5, DIMS)
    assert (weights.rank, weights.file_rank) == (3 * RANK, RANK)
    whole = ModuleWeights(weights.lora_a, weights.lora_b, None, 0.7, random(64))
    bias = 0.7 * random(64)
    for found, y, part in zip(
        LoRASplitLinear(linear, whole, 0.0)(x),
        LoRASplitLinear(linear, weights, 0.0)(x),
        mx.split(bias, [32, 48]),
        strict=True,
    ):
        assert relative_error(np.array(found), np.array(y + part)) < 1e-5


def test_what_is_a_split_layer_and_what_has_an_unknown_form_of_its_own() -> None:
    class Own(nn.Linear):
        def to_lora(self) -> nn.Module:
            return self

    class Several(nn.Linear):
        def __init__(self, indices: Any, output_dims: Any) -> None:
            super().__init__(64, 64)
            self.indices, self.output_dims = indices, output_dims

    assert kind_of(base()) is kind_of(base(4)) is ModuleKind.SPLIT
    assert output_sizes(base(4)) == SIZES
    assert kind_of(Several([32], [32, 32])) is ModuleKind.SPLIT
    for indices, sizes in (([32], [64]), ([32, 16], [32, -16, 48]), ([], [64]), (["a"], [64]), (3, [3, 61])):
        assert kind_of(Several(indices, sizes)) is ModuleKind.LINEAR
    assert kind_of(Own(64, 64)) is None


@pytest.mark.parametrize("num_layers", [-1, 1, 3])
def test_the_choice_and_the_tensors_are_mlx_lms(num_layers: int, tmp_path: Path) -> None:
    config = AdapterConfig.from_values(adapter_values(num_layers=num_layers, keys=None), "test")
    ours, theirs = tiny(AFM), tiny(AFM)
    assert "self_attn.qkv_proj" in default_keys(ours)
    theirs.freeze()
    linear_to_lora_layers(theirs, num_layers, {"keys": None, **config.lora_parameters.model_dump()})
    assert resolve_targets(ours, config).keys() == {
        path for path, module in theirs.named_modules() if "lora_a" in module
    }
    container = AdapterContainer.from_model(ours, config)
    their: dict[str, Any] = dict(tree_flatten(theirs.trainable_parameters()))
    assert dict(tree_flatten(ours.trainable_parameters())).keys() == their.keys()
    assert {name: one.shape for name, one in container.parameters.items()} == {
        name: one.shape for name, one in their.items()
    }

    drawn = [(name, random(*one.shape, seed=at)) for at, (name, one) in enumerate(sorted(their.items()))]
    before, inputs = container.digest, tokens(2, 8)
    gradients = []
    for model in (ours, theirs):
        model.load_weights(drawn, strict=False)
        model.train()
        found: Any = nn.value_and_grad(
            model, lambda model: nn.losses.cross_entropy(model(inputs[:, :-1]), inputs[:, 1:]).mean()
        )(model)[1]
        gradients.append(dict(tree_flatten(found)))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(np.array(gradient), np.array(gradients[1][name]), rtol=1e-4, atol=1e-6)
    moved = {name for name, gradient in gradients[0].items() if mx.any(gradient).item()}
    assert f"{QKV}.lora_a.0" in moved or num_layers == 1
    assert container.digest != before
    ours.eval()
    trained = np.array(ours(inputs))
    container.save(tmp_path / "saved")
    assert np.array_equal(alone(tiny(AFM), tmp_path / "saved", inputs), trained)
    assert AdapterContainer.from_directory(tmp_path / "saved").digest == container.digest


def test_mlx_lm_refuses_the_names_of_its_own_tensors(tmp_path: Path) -> None:
    # So that "mlx-lm loads it" is said of its layers here, not of its load_adapters.
    folder = make_adapter(tmp_path / "a", tiny(AFM), keys=["self_attn.qkv_proj"])
    with pytest.raises(ValueError, match=r"lora_a\.0: not an adapter parameter"):
        load_adapters(tiny(AFM), str(folder))


def test_there_is_no_dora_of_split_layers(tmp_path: Path) -> None:
    theirs = tiny(AFM)
    linear_to_lora_layers(theirs, 4, adapter_values(keys=None)["lora_parameters"], use_dora=True)
    with pytest.raises(ValueError, match="unpack"):
        theirs(tokens(1, 8))
    model, reason = tiny(AFM), "DoRA has one output"
    config = AdapterConfig.from_values(adapter_values("dora", keys=None), "test")
    with pytest.raises(InvalidAdapterError, match=reason) as caught:
        resolve_targets(model, config)
    assert [problem.split()[0] for problem in caught.value.problems] == [
        f"model.layers.{at}.self_attn.qkv_proj" for at in (0, 1)
    ]
    weights = {QKV: ModuleWeights(random(64, 2), random(2, 128), mx.ones(128), 1.0)}
    mx.eval(weights[QKV].arrays)
    with pytest.raises(InvalidAdapterError, match=reason):
        AdapterContainer.from_weights(weights, "test").check(model)
    write_adapter(tmp_path / "peft", weights, "peft")
    with pytest.raises(InvalidAdapterError, match=reason):
        AdapterContainer.from_directory(tmp_path / "peft").check(model)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("precision", ["auto", "requantize", "keep", "dequantize"])
def test_fusing_keeps_the_outputs_apart_and_is_undone_to_the_bit(
    precision: Precision, bits: int | None, tmp_path: Path
) -> None:
    model, inputs = tiny(AFM, bits), tokens(2, 9)
    container = AdapterContainer.from_directory(
        make_adapter(tmp_path / "a", model, keys=["self_attn.qkv_proj", "mlp.up_proj"], size=0.1)
    )
    before, weights = snapshot(model), container.check(model)
    container.load(into=model)
    adapted = np.array(model(inputs))
    layers: dict[str, Any] = {path: dict(model.named_modules())[path] for path in weights}
    container.unload(from_=model)
    modules, _ = container.fused_modules(model, precision)
    report = compare_activations(model, layers, modules, cast("list[list[int]]", inputs.tolist()))
    assert (report.worst_module is None) == (report.error_worst == 0)
    assert report.error_worst < {"requantize": 0.9, "auto": 0.06}.get(precision, 1e-3)
    fusion = container.fuse(with_=model, precision=precision)
    if precision != "requantize" or bits is None:
        assert relative_error(np.array(model(inputs)), adapted) < (
            0.05 if precision == "auto" and bits else 1e-4
        )
    fusion.undo()
    assert snapshot(model) == before


def test_rows_that_are_not_concerned_keep_their_values(tmp_path: Path) -> None:
    model = tiny(AFM)
    folders = [make_adapter(tmp_path / str(seed), model, keys=None, seed=seed) for seed in (1, 2)]
    resident = Resident(model)
    first, second = (resident.add(folder) for folder in folders)
    assert (first.rank, resident.bank.residents) == (4, {first, second})
    inputs = tokens(3, 9)
    mixed = resident.logits(inputs, [only(first), (), only(second)], 3)
    assert np.array_equal(mixed[1], resident.logits(inputs, [()] * 3, 3)[1])
    blended = resident.logits(inputs, [((first, 0.5), (second, -1.0)), (), ()])[0]
    parts = [AdapterContainer.from_directory(folder).check(tiny(AFM)) for folder in folders]
    total = AdapterContainer.from_weights(summed([(parts[0], 0.5), (parts[1], -1.0)]), "sum")
    one = tiny(AFM)
    total.load(into=one)
    assert relative_error(blended, alone(one, None, inputs[:1])[0]) < 1e-4


def test_every_way_of_writing_gives_the_same_adapter(tmp_path: Path) -> None:
    model, inputs = tiny(AFM), tokens(2, 9)
    folder = make_adapter(tmp_path / "a", model, keys=["self_attn.qkv_proj", "mlp.down_proj"])
    container = AdapterContainer.from_directory(folder)
    weights = container.check(model)
    expected = alone(tiny(AFM), folder, inputs)
    assert bits_of(read_unplaced(folder).weights) == bits_of(weights)
    for name, known in (("known", model), ("unknown", None)):
        write_adapter(tmp_path / name, weights, "mlx", known)
        again = AdapterContainer.from_directory(tmp_path / name)
        assert bits_of(again.check(model)) == bits_of(weights)
        assert np.array_equal(alone(tiny(AFM), tmp_path / name, inputs), expected)
    write_adapter(tmp_path / "peft", weights, "peft", model)
    peft = AdapterContainer.from_directory(tmp_path / "peft")
    assert {one.rank for path, one in peft.check(model).items() if "qkv" in path} == {12}
    peft.load(into=model)
    assert relative_error(np.array(model(inputs)), expected) < 1e-5
    peft.unload(from_=model)
    write_adapter(tmp_path / "back", peft.check(model), "mlx", model)
    assert bits_of(AdapterContainer.from_directory(tmp_path / "back").check(model)) == bits_of(weights)


@pytest.mark.parametrize(
    "options", [BlendOptions("linear"), BlendOptions("svd", rank=5), BlendOptions("ties", 0.5)]
)
def test_blends_are_written_with_factors_for_each_output(options: BlendOptions, tmp_path: Path) -> None:
    model, inputs = tiny(AFM), tokens(2, 9)
    parts = []
    for seed, weight in ((1, 0.8), (2, -0.5)):
        folder = make_adapter(tmp_path / str(seed), model, keys=["self_attn.qkv_proj"], seed=seed)
        parts.append(BlendPart(str(seed), weight, AdapterContainer.from_directory(folder).check(model)))
    blended = AdapterContainer.from_weights(blend(parts, options).modules, "blend")
    blended.load(into=model)
    expected = np.array(model(inputs))
    blended.unload(from_=model)
    write_adapter(tmp_path / "mlx", blended.check(model), "mlx", model)
    written = AdapterContainer.from_directory(tmp_path / "mlx").config.lora_parameters.rank
    assert written == {"linear": 8, "svd": 5, "ties": 4}[options.method]
    assert relative_error(alone(tiny(AFM), tmp_path / "mlx", inputs), expected) < 1e-4


def test_tensors_that_are_not_those_of_the_module_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny(AFM)
    values = adapter_values(keys=[QKV, DOWN])
    good = adapter_tensors(model, values)

    def problems(changes: dict[str, mx.array | None], read: Any) -> list[str]:
        tensors = {name: tensor for name, tensor in {**good, **changes}.items() if tensor is not None}
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(InvalidAdapterError) as caught:
            read(write_tensors(folder, values, tensors))
        return list(caught.value.problems)

    def check(folder: Path) -> None:
        AdapterContainer.from_directory(folder).check(model)

    missing: dict[str, mx.array | None] = {f"{QKV}.lora_b.1": None}
    assert problems(missing, check) == [
        f"tensor {QKV}.lora_b.1: expected shape (4, 32), the file has none of this name"
    ]
    assert problems(missing, read_unplaced) == [
        f"tensor {QKV}.lora_b.1: the file has none of this name, but others of this module"
    ]
    wrong: dict[str, mx.array | None] = {f"{QKV}.lora_a.2": mx.zeros((63, 4))}
    assert "lora_a.2: expected shape (64, 4) (rank 4), got (63, 4)" in problems(wrong, check)[0]
    assert problems(wrong, read_unplaced) == [
        f"module {QKV}: expected factors of rank 4, got lora_a.2 (63, 4) and lora_b.2 (4, 32)"
    ]
    assert len(problems({f"{QKV}.lora_a.0": mx.array(1.0)}, read_unplaced)) == 3
    for name in (f"{QKV}.lora_a", f"{QKV}.lora_b.3", f"{DOWN}.lora_a.0"):
        assert (
            f"tensor {name}: not expected: the tensors of this module are"
            in problems({name: mx.zeros((64, 4))}, check)[0]
        )
        assert name.rpartition(".lora")[0] in problems({name: mx.zeros((64, 4))}, read_unplaced)[0]
    other = {path: ModuleWeights.of_parts(pairs(), 1.0) for path in (QKV, DOWN)}
    found = [
        problem.split(":")[:2]
        for problem in _refused(AdapterContainer.from_weights(other, "test"), model)
        if "parts" in problem
    ]
    assert found == [[f"module {QKV}", " parts"], [f"module {DOWN}", " parts"]]


def _refused(container: AdapterContainer, model: nn.Module) -> list[str]:
    with pytest.raises(InvalidAdapterError) as caught:
        container.check(model)
    return list(caught.value.problems)
