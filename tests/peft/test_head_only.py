"""A head that is tied to the embedding and adapted alone, as in PEFT: logits + s·B A h."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from adapters_core.blending.blend import BlendOptions, BlendPart, blend
from adapters_core.container import AdapterContainer
from adapters_core.errors import BlendError, InvalidAdapterError, InvalidBlendError
from adapters_core.formats.writing import write_adapter
from adapters_core.fusing.sums import summed
from adapters_core.layers.modules import dense_weight
from tests.mixed.resident import Resident, only
from tests.models import snapshot
from tests.peft import fixtures

EMBEDDING, HEAD = "model.embed_tokens", "base_model.model.lm_head"
RANK, ALPHA = 3, 6
TOLERANCE = 1e-4


def _tensors(is_dora: bool = False) -> dict[str, mx.array]:
    rng = np.random.default_rng(5)
    found = {
        f"{HEAD}.lora_A.weight": mx.array(rng.normal(0, 0.3, (RANK, 32)), mx.float32),
        f"{HEAD}.lora_B.weight": mx.array(rng.normal(0, 0.3, (64, RANK)), mx.float32),
    }
    if is_dora:
        found[f"{HEAD}.lora_magnitude_vector"] = mx.array(rng.uniform(0.5, 1.5, 64), mx.float32)
    return found


def _folder(directory: Path, **fields: Any) -> Path:
    """As PEFT writes it where target_modules name the head: with a copy of the embedding."""
    directory.mkdir(parents=True)
    values = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["lm_head"]} | fields
    (directory / "adapter_config.json").write_text(json.dumps(values))
    model: Any = fixtures.model("qwen3")
    copy = {"base_model.model.model.embed_tokens.weight": model.model.embed_tokens.weight}
    tensors = _tensors(bool(fields.get("use_dora"))) | copy
    mx.save_safetensors(str(directory / "adapter_model.safetensors"), tensors)
    return directory


def _expected(model: Any, is_dora: bool = False) -> np.ndarray:
    """W h + s·B A h, with W as the base has it; times m / ‖W + s·B A‖ for each token's row with DoRA."""
    tensors, scale = _tensors(is_dora), ALPHA / RANK
    a, b = tensors[f"{HEAD}.lora_A.weight"], tensors[f"{HEAD}.lora_B.weight"]
    h = model.model(fixtures.tokens())
    weight = dense_weight(model.model.embed_tokens).astype(mx.float32)
    logits = h @ weight.T + scale * ((h @ a.T) @ b.T)
    if is_dora:
        norm = mx.linalg.norm(weight + scale * (b @ a), axis=1)
        logits = logits * (tensors[f"{HEAD}.lora_magnitude_vector"] / norm)
    return np.array(logits.astype(mx.float32))


def _logits(model: nn.Module) -> np.ndarray:
    return np.array(model(fixtures.tokens()).astype(mx.float32))


def _fits(_: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module["weight"].shape[-1] % 32 == 0


def _quantised() -> nn.Module:
    model = fixtures.model("qwen3")
    nn.quantize(model, group_size=32, bits=4, class_predicate=_fits)
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("make", [lambda: fixtures.model("qwen3"), _quantised], ids=["dense", "quantised"])
@pytest.mark.parametrize("is_dora", [False, True], ids=["lora", "dora"])
def test_it_is_served_alone_and_in_mixed_rows(
    tmp_path: Path, make: Callable[[], nn.Module], is_dora: bool
) -> None:
    folder = _folder(tmp_path / "head", use_dora=is_dora)
    expected, base = _expected(make(), is_dora), _logits(make())
    assert np.abs(expected - base).max() > 0.1
    model = make()
    before = snapshot(model)
    container = AdapterContainer.from_directory(folder)
    weights = container.check(model)
    assert [(path, one.head_only, one.lookup_only) for path, one in weights.items()] == [
        (EMBEDDING, True, False)
    ]
    container.load(into=model)
    np.testing.assert_allclose(_logits(model), expected, atol=TOLERANCE, rtol=0)
    container.unload(from_=model)
    assert snapshot(model) == before

    here = Resident(make())
    head = here.add(folder)
    other = here.add(fixtures.adapter("qwen3"))
    both = AdapterContainer.from_directory(fixtures.adapter("qwen3"))
    with_other = make()
    both.load(into=with_other)
    rows = here.logits(fixtures.tokens(), [only(head), (), only(other)])
    for row, whole in enumerate((expected, base, _logits(with_other))):
        np.testing.assert_allclose(rows[row], whole[row], atol=TOLERANCE, rtol=0)
    alone = here.logits(fixtures.tokens(), [only(head)] * 3)
    np.testing.assert_allclose(alone, expected, atol=TOLERANCE, rtol=0)


def test_fusing_it_keeps_it_beside_or_says_why_not(tmp_path: Path) -> None:
    model = fixtures.model("qwen3")
    container, before = AdapterContainer.from_directory(_folder(tmp_path / "head")), snapshot(model)
    for precision in ("auto", "requantize", "dequantize"):
        with pytest.raises(InvalidAdapterError, match=r"the look-up is not, for which the"):
            container.fuse(with_=model, precision=precision)
        assert snapshot(model) == before
    fusion = container.fuse(with_=model, precision="keep")
    np.testing.assert_allclose(_logits(model), _expected(fixtures.model("qwen3")), atol=TOLERANCE, rtol=0)
    fusion.undo()
    assert snapshot(model) == before


def test_it_blends_with_its_kind_alone(tmp_path: Path) -> None:
    model = fixtures.model("qwen3")
    weights = AdapterContainer.from_directory(_folder(tmp_path / "head")).check(model)
    parts = [BlendPart("one", 0.25, weights), BlendPart("two", 0.75, weights)]
    blended = blend(parts, BlendOptions()).modules
    assert blended[EMBEDDING].head_only
    made = AdapterContainer.from_weights(blended, "both")
    made.load(into=model)
    np.testing.assert_allclose(_logits(model), _expected(fixtures.model("qwen3")), atol=TOLERANCE, rtol=0)
    looked_up = AdapterContainer.from_directory(fixtures.adapter("lookup-only")).check(
        fixtures.model("qwen3")
    )
    other = BlendPart("other", 1.0, {EMBEDDING: looked_up[EMBEDDING]})
    with pytest.raises(InvalidBlendError, match="no one can"):
        blend([parts[0], other], BlendOptions())
    with pytest.raises(BlendError, match=r"adapted for its tied head alone, .* at weight 1"):
        summed([(weights, 0.5)])


@pytest.mark.parametrize("is_dora", [False, True], ids=["lora", "dora"])
def test_pefts_format_says_it_and_mlx_lms_says_that_it_cannot(tmp_path: Path, is_dora: bool) -> None:
    model = fixtures.model("qwen3")
    weights = AdapterContainer.from_directory(_folder(tmp_path / "head", use_dora=is_dora)).check(model)
    write_adapter(tmp_path / "again", weights, "peft", model)
    written = mx.load(str(tmp_path / "again" / "adapter_model.safetensors"))
    assert isinstance(written, dict)
    assert written.keys() == _tensors(is_dora).keys()
    assert all(mx.array_equal(written[name], tensor) for name, tensor in _tensors(is_dora).items())
    values = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (values["target_modules"], values["ensure_weight_tying"]) == (["lm_head"], False)
    AdapterContainer.from_directory(tmp_path / "again").load(into=model)
    expected = _expected(fixtures.model("qwen3"), is_dora)
    np.testing.assert_allclose(_logits(model), expected, atol=TOLERANCE, rtol=0)
    with pytest.raises(InvalidAdapterError, match=r"its look-up is not, which mlx-lm's format cannot say"):
        write_adapter(tmp_path / "mlx", weights, "mlx", fixtures.model("qwen3"))


def test_its_digest_is_its_own(tmp_path: Path) -> None:
    weights = AdapterContainer.from_directory(_folder(tmp_path / "head")).check(fixtures.model("qwen3"))
    digests = {
        AdapterContainer.from_weights({EMBEDDING: one}, "x").digest
        for one in (weights[EMBEDDING], replace(weights[EMBEDDING], head_only=False))
    }
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"ensure_weight_tying": True}, "the model's head is tied to its embedding"),
        ({"target_modules": ["q_proj"]}, "leaves module lm_head out"),
        ({"lora_bias": True}, "expected shape"),
    ],
)
def test_what_it_cannot_be_is_refused(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidAdapterError) as refused:
        AdapterContainer.from_directory(_folder(tmp_path / "head", **fields)).check(fixtures.model("qwen3"))
    assert reason in "\n".join(refused.value.problems)
