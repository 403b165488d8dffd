"""Adapters that do not fit: refused with every problem, and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError
from tests.models import (
    QKV,
    adapter_tensors,
    adapter_values,
    logits,
    make_adapter,
    snapshot,
    tiny_llama,
    write_adapter,
)

KINDS = ["lora", "dora"]
Q0 = "model.layers.0.self_attn.q_proj"

Tensors = dict[str, mx.array]
Values = dict[str, Any]


def _without(tensors: Tensors, *names: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


BAD_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing a": (lambda t: _without(t, f"{Q0}.lora_a"), f"{Q0}.lora_a: expected shape (64, 4)"),
    "missing b": (lambda t: _without(t, f"{Q0}.lora_b"), f"{Q0}.lora_b: expected shape (4, 64)"),
    "whole module missing": (lambda t: _without(t, f"{Q0}.lora_a", f"{Q0}.lora_b", f"{Q0}.m"), Q0),
    "a transposed": (lambda t: {**t, f"{Q0}.lora_a": t[f"{Q0}.lora_a"].T}, "got (4, 64)"),
    "another rank": (lambda t: {**t, f"{Q0}.lora_b": mx.zeros((6, 64))}, "(rank 4), got (6, 64)"),
    "another width": (lambda t: {**t, f"{Q0}.lora_a": mx.zeros((96, 4))}, "got (96, 4)"),
    "a vector": (lambda t: {**t, f"{Q0}.lora_a": mx.zeros((256,))}, "got (256,)"),
    "no rank": (lambda t: {**t, f"{Q0}.lora_a": mx.zeros((64, 0))}, "got (64, 0)"),
    "unknown layer": (
        lambda t: {**t, "model.layers.9.self_attn.q_proj.lora_a": mx.zeros((64, 4))},
        "no module model.layers.9.self_attn.q_proj",
    ),
    "untargeted module": (lambda t: {**t, "lm_head.lora_a": mx.zeros((64, 4))}, "leaves this module out"),
    "other weights": (lambda t: {**t, "model.norm.weight": mx.zeros((64,))}, "not the name of an adapter's"),
    "bare name": (lambda t: {**t, "lora_a": mx.zeros((64, 4))}, "lora_a: not expected"),
    "PEFT names": (
        lambda t: {f"base_model.model.{name}.weight": tensor for name, tensor in t.items()},
        "not the name of an adapter's tensor",
    ),
    "integers": (lambda t: {**t, f"{Q0}.lora_a": mx.zeros((64, 4), mx.int32)}, "got I32"),
    "NaN": (lambda t: {**t, f"{Q0}.lora_a": mx.full((64, 4), mx.nan)}, "NaN or infinite"),
}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused_and_change_nothing(
    tmp_path: Path, bits: int | None, kind: str, case: str
) -> None:
    change, expected = BAD_TENSORS[case]
    model = tiny_llama(0, bits)
    values = adapter_values(kind)
    folder = write_adapter(tmp_path / "bad", values, change(adapter_tensors(model, values)))
    before, base = snapshot(model), logits(model)
    for act in (AdapterContainer.load, AdapterContainer.fuse, AdapterContainer.check):
        with pytest.raises(InvalidAdapterError) as caught:
            act(AdapterContainer.from_directory(folder), model)
        assert caught.value.source == "bad"
        assert any(expected in problem for problem in caught.value.problems)
        assert str(tmp_path) not in str(caught.value)
    assert snapshot(model) == before
    np.testing.assert_array_equal(logits(model), base)


BAD_VALUES: dict[str, tuple[Callable[[Values], None], str]] = {
    "other rank": (
        lambda v: v["lora_parameters"].update(rank=8),
        "expected shape (64, 8) (rank 8), got (64, 4)",
    ),
    "fewer layers": (lambda v: v.update(num_layers=1), "leaves this module out (num_layers 1"),
    "other keys": (lambda v: v["lora_parameters"].update(keys=QKV[:2]), "leaves this module out"),
    "more keys": (lambda v: v["lora_parameters"].update(keys=[*QKV, "mlp.up_proj"]), "the file has none"),
    "no such key": (
        lambda v: v["lora_parameters"].update(keys=[*QKV, "mlp.nope"]),
        "'mlp.nope' matches no module",
    ),
    "norm": (lambda v: v["lora_parameters"].update(keys=[*QKV, "model.norm"]), "is a RMSNorm"),
    "impossible rank": (lambda v: v["lora_parameters"].update(rank=-1), "rank: expected a whole number"),
    "infinite scale": (lambda v: v["lora_parameters"].update(scale=1e400), "Infinity"),
    "full": (lambda v: v.update(fine_tune_type="full"), "Serve the folder as a model"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_configs_that_do_not_fit_are_refused_and_change_nothing(tmp_path: Path, case: str) -> None:
    change, expected = BAD_VALUES[case]
    model = tiny_llama()
    values = adapter_values()
    tensors = adapter_tensors(model, values)
    change(values)
    folder = write_adapter(tmp_path / "bad", values, tensors)
    before = snapshot(model)
    with pytest.raises(InvalidAdapterError) as caught:
        AdapterContainer.from_directory(folder).load(into=model)
    assert any(expected in problem for problem in caught.value.problems)
    assert snapshot(model) == before


def test_a_dora_needs_magnitudes_and_a_lora_has_none(tmp_path: Path) -> None:
    model = tiny_llama()
    lora, dora = adapter_values("lora"), adapter_values("dora")
    without = write_adapter(tmp_path / "without", dora, adapter_tensors(model, lora))
    with_ = write_adapter(tmp_path / "with", lora, adapter_tensors(model, dora))
    with pytest.raises(InvalidAdapterError, match=r"\.m: expected shape \(64,\)") as missing:
        AdapterContainer.from_directory(without).check(model)
    with pytest.raises(InvalidAdapterError, match="a magnitude, but fine_tune_type is lora") as extra:
        AdapterContainer.from_directory(with_).check(model)
    assert len(missing.value.problems) == len(extra.value.problems) == 9


def test_the_problems_of_both_files_come_in_one_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InvalidAdapterError) as caught:
        AdapterContainer.from_directory(empty)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "adapter_config.json",
        "adapters.safetensors",
    ]


def test_a_folder_that_is_not_there_is_one_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("no such folder", "file"):
        with pytest.raises(InvalidAdapterError) as caught:
            AdapterContainer.from_directory(tmp_path / name)
        assert caught.value.problems == ("expected a folder of this name, there is none",)


def test_every_problem_of_a_misfit_is_listed(tmp_path: Path) -> None:
    model = tiny_llama()
    values = adapter_values(keys=[*QKV, "nope"])
    tensors = adapter_tensors(model, adapter_values())
    tensors.pop(f"{Q0}.lora_a")
    tensors["lm_head.lora_b"] = mx.zeros((4, 96))
    tensors["model.layers.1.self_attn.k_proj.lora_b"] = mx.zeros((4, 31))
    folder = write_adapter(tmp_path / "bad", values, tensors)
    with pytest.raises(InvalidAdapterError) as caught:
        AdapterContainer.from_directory(folder).check(model)
    assert len(caught.value.problems) == 4
    assert all(problem in str(caught.value) for problem in caught.value.problems)


def test_an_adapter_of_another_model_is_refused_in_full(tmp_path: Path) -> None:
    small = tiny_llama(hidden_size=32, num_hidden_layers=4)
    model = tiny_llama()
    folder = make_adapter(tmp_path / "a", small, keys=None)
    before = snapshot(model)
    with pytest.raises(InvalidAdapterError) as caught:
        AdapterContainer.from_directory(folder).load(into=model)
    assert len(caught.value.problems) > 14
    assert snapshot(model) == before
