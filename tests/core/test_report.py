"""The load report: with a model, and of the files alone."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from adapters_core.bank import AdapterBank
from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError
from adapters_core.formats.unplaced import read_unplaced
from adapters_core.formats.writing import write_adapter
from adapters_core.layers.modules import kind_of
from adapters_core.layers.targets import module_at
from adapters_core.mixed.routing import Routing
from adapters_core.report import LoadReport, parts_of
from tests.models import adapter_tensors, adapter_values, make_adapter, tiny_llama
from tests.models import write_adapter as write_files

from .test_writing import DOWN1, EMBED, HEAD, Q0, Q1, V2, random_weights, tensors, tiny_mixtral


def report_of(folder: Path, model: Any) -> LoadReport:
    container = AdapterContainer.from_directory(folder)
    weights = container.check(model)
    kinds = {path: kind_of(module_at(model, path)) for path in weights}
    return LoadReport.of(container, parts_of(weights, kinds))


def test_a_report_on_a_model_says_what_was_matched(tmp_path: Path) -> None:
    model = tiny_llama()
    weights = random_weights(model, [Q0, Q1, V2, DOWN1, EMBED, HEAD], [4, 6, 4, 1, 2, 4], [2, 1, 2, 3, 2, 2])
    write_adapter(tmp_path / "a", weights, "peft", model, base_name="someone/Tiny-Llama", dropout=0.1)
    report = report_of(tmp_path / "a", model)
    container = AdapterContainer.from_directory(tmp_path / "a")
    assert report.to_values() == {
        "format": "peft",
        "type": "lora",
        "digest": container.digest,
        "base_name": "someone/Tiny-Llama",
        "modules": 6,
        "kinds": {"embedding": 1, "linear": 5},
        "names": {"down_proj": 1, "embed_tokens": 1, "lm_head": 1, "q_proj": 2, "v_proj": 1},
        "layers": [0, 1, 2],
        "ranks": [1, 2, 4, 6],
        "scales": [1.0, 2.0, 3.0],
        "dtypes": ["float32"],
        "tensor_bytes": sum(a.nbytes for one in weights.values() for a in (one.lora_a, one.lora_b)),
        "ignored_fields": ["lora_dropout"],
        "warnings": [],
    }
    json.dumps(report.to_values(), allow_nan=False)


def test_the_bank_makes_a_report_of_what_it_prepares(tmp_path: Path) -> None:
    model = tiny_llama()
    container = AdapterContainer.from_directory(
        make_adapter(tmp_path / "a", model, "dora", keys=["mlp.up_proj"])
    )
    report = AdapterBank(model, Routing()).prepare(container).resident.report
    assert report is not None
    assert report == report_of(tmp_path / "a", model)
    assert (report.type, report.kinds) == ("dora", {"linear": 3})


def test_experts_are_switch_layers(tmp_path: Path) -> None:
    model = tiny_mixtral()
    up = "model.layers.1.block_sparse_moe.switch_mlp.up_proj"
    weights = random_weights(model, [up, Q1], [3, 3], [2.0, 2.0], mx.bfloat16)
    write_adapter(tmp_path / "a", weights, "mlx", model)
    report = report_of(tmp_path / "a", model)
    assert (report.kinds, report.ranks, report.dtypes) == ({"linear": 1, "switch": 1}, (3,), ("bfloat16",))


@pytest.mark.parametrize("form", ["mlx", "peft"])
@pytest.mark.parametrize("is_dora", [False, True])
def test_the_files_alone_say_the_same(tmp_path: Path, form: Any, is_dora: bool) -> None:
    model = tiny_llama()
    weights = random_weights(model, [Q0, Q1, V2, HEAD], [4] * 4, [20 / 3] * 4, is_dora=is_dora)
    write_adapter(tmp_path / "a", weights, form, model, base_name="Tiny")
    unplaced = read_unplaced(tmp_path / "a")
    assert tensors({path: unplaced.weights[path] for path in weights}) == tensors(weights)
    assert unplaced.open == {}
    alone = LoadReport.of(unplaced, unplaced.parts)
    assert replace(report_of(tmp_path / "a", model), kinds={}, digest=None) == alone


def test_what_no_file_says_stays_open(tmp_path: Path) -> None:
    model = tiny_llama()
    weights = random_weights(model, [EMBED, Q0], [2, 2], [1.0, 1.0])
    for form in ("mlx", "peft"):
        write_adapter(tmp_path / form, weights, form, model)
        unplaced = read_unplaced(tmp_path / form)
        assert (unplaced.open.keys(), unplaced.weights.keys()) == ({EMBED}, {Q0})
        assert unplaced.parts.keys() == {EMBED, Q0}


def test_the_files_alone_show_their_problems(tmp_path: Path) -> None:
    model = tiny_llama()
    values = adapter_values(rank=4)
    good = adapter_tensors(model, values)
    names = sorted(good)
    bad = {**good, "odd.name": good[names[0]], f"{Q0}.m": mx.zeros(64), names[1]: mx.zeros((3, 64))}
    del bad["model.layers.2.self_attn.v_proj.lora_a"]
    with pytest.raises(InvalidAdapterError) as caught:
        read_unplaced(write_files(tmp_path / "a", values, bad))
    problems = caught.value.problems
    assert len(problems) == 4
    for part in ("tensor odd.name:", f"tensor {Q0}.m:", "rank 4, got", "v_proj.lora_a: the file has none"):
        assert sum(part in problem for problem in problems) == 1, part
    write_adapter(tmp_path / "p", random_weights(model, [Q0, V2], [2, 2], [1.0, 1.0]), "peft")
    config = tmp_path / "p" / "adapter_config.json"
    changed = {**json.loads(config.read_text()), "target_modules": ["q_proj"], "r": 3}
    config.write_text(json.dumps(changed))
    with pytest.raises(InvalidAdapterError) as caught:
        read_unplaced(tmp_path / "p")
    assert len(caught.value.problems) == 4
    with pytest.raises(InvalidAdapterError, match="expected a file of this name"):
        read_unplaced(tmp_path)


def test_training_fields_of_mlx_lm_are_named(tmp_path: Path) -> None:
    model = tiny_llama()
    values = adapter_values() | {
        "model": "/Users/me/models/Tiny",
        "iters": 100,
        "lr_schedule": None,
        "seed": 0,
    }
    values["lora_parameters"] |= {"dropout": 0.05, "alpha": 16}
    folder = write_files(tmp_path / "a", values, adapter_tensors(model, values))
    report = report_of(folder, model)
    assert report.ignored_fields == ("iters", "lora_parameters.alpha", "lora_parameters.dropout")
    assert report.base_name == "Tiny"


@pytest.mark.parametrize(
    ("named", "ours", "warns"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", ["Llama-3.2-1B-Instruct-4bit"], False),
        ("unsloth/llama-3.2-1b-instruct-bnb-4bit", ["demo", "Llama-3.2-1B-Instruct-bf16"], False),
        ("/home/me/Llama-3.2-1B-Instruct/", ["Llama-3.2-1B-Instruct"], False),
        ("C:\\models\\Llama-3.2-1B", ["Llama-3.2-1B"], False),
        ("meta-llama/Llama-3.2-1B", ["Llama-3.2-1B-Instruct"], True),
        ("Qwen/Qwen3-4B", ["Qwen3-4B-MLX-4bit"], False),
        ("Qwen/Qwen3-4B", ["Qwen3-4B-Base"], True),
        ("Qwen/Qwen3-4B", [], False),
        (None, ["Qwen3-4B"], False),
    ],
)
def test_another_base_of_the_same_sizes_is_a_warning(
    tmp_path: Path, named: str | None, ours: list[str], warns: bool
) -> None:
    model = tiny_llama()
    write_adapter(tmp_path / "a", random_weights(model, [Q0], [2], [1.0]), "peft", base_name=named)
    warnings = report_of(tmp_path / "a", model).beside(ours).warnings
    assert len(warnings) == warns
    assert all(ours[0] in warning for warning in warnings)


def test_an_adapter_that_changes_nothing_is_a_warning(tmp_path: Path) -> None:
    model = tiny_llama()
    weights = random_weights(model, [Q0, Q1], [2, 2], [1.0, 0.0])
    (some,) = LoadReport.of(AdapterContainer.from_weights(weights, "a"), parts_of(weights)).warnings
    assert some.startswith("1 of 2 modules change nothing")
    assert some.endswith(f"{Q1}.")
    weights[Q0] = replace(weights[Q0], lora_b=mx.zeros_like(weights[Q0].lora_b))
    (every,) = LoadReport.of(AdapterContainer.from_weights(weights, "a"), parts_of(weights)).warnings
    assert every.startswith("The adapter changes nothing")
    dora = random_weights(model, [Q0], [2], [0.0], is_dora=True)
    assert LoadReport.of(AdapterContainer.from_weights(dora, "a"), parts_of(dora)).warnings == ()


def test_a_report_of_files_needs_no_mlx_lm() -> None:
    code = "import sys, adapters_core.report, adapters_core.formats.unplaced; print('mlx_lm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
