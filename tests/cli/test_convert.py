"""`mlx-graft convert`: from each format to the other, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adapters_core.container import AdapterContainer
from tests.models import logits, make_adapter, relative_error, tiny_llama
from tests.peft.fixtures import adapter, base_of, expected, model, model_folder, tokens

from .conftest import Program


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_there_and_back_without_a_model(command: Program, tmp_path: Path, kind: str) -> None:
    base = tiny_llama()
    first = make_adapter(tmp_path / "a", base, kind, keys=["self_attn.q_proj", "mlp.up_proj"])
    there = command("convert", str(first), str(tmp_path / "b"), "--to", "peft")
    assert (there.code, there.err) == (0, "")
    assert there.out == (
        "Wrote b in the format peft: 6 modules.\nIt was not compared with a model; --model does that.\n"
    )
    assert command("convert", str(tmp_path / "b"), str(tmp_path / "c"), "--to", "mlx").code == 0
    found = [AdapterContainer.from_directory(tmp_path / name) for name in "abc"]
    assert [one.format for one in found] == ["mlx", "peft", "mlx"]
    assert found[0].parameters.keys() == found[2].parameters.keys()
    for name, tensor in found[0].parameters.items():
        np.testing.assert_array_equal(np.array(tensor), np.array(found[2].parameters[name]))
    answers = []
    for one in found:
        one.load(into=base)
        answers.append(logits(base))
        one.unload(from_=base)
    assert relative_error(answers[1], answers[0]) < 1e-6
    assert relative_error(answers[2], answers[0]) < 1e-6


UNEQUAL_RANKS = {"patterns", "dora-rslora", "experts-qwen3", "tokens", "tokens-tied"}


@pytest.mark.parametrize("name", ["embedding", "falcon-h1", "gpt2", "tied", *sorted(UNEQUAL_RANKS)])
def test_pefts_adapters_in_mlx_lms_format_give_pefts_logits(
    command: Program, tmp_path: Path, name: str
) -> None:
    base = base_of(name)
    done = command(
        "convert", str(adapter(name)), str(tmp_path / "a"), "--to", "mlx", "--model", str(model_folder(base))
    )
    assert (done.code, done.err) == (0, "")
    assert ("Ranks differ" in done.out) == (name in UNEQUAL_RANKS)
    adapted = model(base)
    AdapterContainer.from_directory(tmp_path / "a").load(into=adapted)
    np.testing.assert_allclose(np.array(adapted(tokens())), expected(name), atol=1e-4)


def test_names_that_pefts_model_may_not_have_are_told(command: Program, tmp_path: Path) -> None:
    base = str(model_folder("gpt2"))
    there = command("convert", str(adapter("gpt2")), str(tmp_path / "a"), "--to", "mlx", "--model", base)
    assert there.code == 0
    back = command("convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "peft")
    assert (back.code, back.err) == (0, "")
    assert "8 module(s), such as model.h.0.attn.c_attn, are named as in the MLX model" in back.out


def test_a_base_whose_weights_are_multiplied_needs_the_model(command: Program, tmp_path: Path) -> None:
    done = command("convert", str(adapter("falcon-h1")), str(tmp_path / "a"), "--to", "mlx")
    assert (done.code, done.out) == (1, "")
    assert "mlx-lm multiplies the weights of Falcon-H1" in done.err
    assert list(tmp_path.iterdir()) == []


def test_what_names_leave_open_needs_the_model(command: Program, tmp_path: Path) -> None:
    done = command("convert", str(adapter("tied")), str(tmp_path / "a"), "--to", "mlx")
    assert (done.code, done.out) == (1, "")
    heading, *problems = done.err.splitlines()
    assert heading == f"error: tied cannot be converted, for {len(problems)} reason(s):"
    assert all("--model" in problem for problem in problems)
    assert list(tmp_path.iterdir()) == []


def test_what_a_format_cannot_say_is_listed(command: Program, tmp_path: Path) -> None:
    done = command("convert", str(adapter("bias")), str(tmp_path / "a"), "--to", "mlx")
    assert done.code == 1
    assert done.err.count("it has a bias of its own") == 3
    assert done.err.endswith("(and 1 more like this)\n")
    base = str(model_folder(base_of("lookup-only")))
    done = command(
        "convert", str(adapter("lookup-only")), str(tmp_path / "a"), "--to", "mlx", "--model", base
    )
    assert (done.code, done.err.count("the head that is tied to it is not")) == (1, 1)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(command: Program, tmp_path: Path) -> None:
    there = make_adapter(tmp_path / "there", tiny_llama())
    before = {path.name: path.read_bytes() for path in there.iterdir()}
    done = command("convert", str(adapter("plain")), str(there), "--to", "mlx")
    assert (done.code, done.out) == (1, "")
    assert "there is a 'there' already" in done.err
    assert {path.name: path.read_bytes() for path in there.iterdir()} == before
    same = command("convert", str(there), str(tmp_path / "new"), "--to", "mlx")
    assert (same.code, "already" in same.err) == (1, True)
    blocked = command("convert", str(there), str(there / "adapter_config.json" / "x"), "--to", "peft")
    assert blocked.code == 1
    assert "cannot be written" in blocked.err
    assert command("convert", str(tmp_path / "none"), str(tmp_path / "x"), "--to", "mlx").code == 2


def test_as_json(command: Program, tmp_path: Path) -> None:
    done = command("convert", str(adapter("patterns")), str(tmp_path / "a"), "--to", "mlx", "--json")
    body = json.loads(done.out)
    assert body.pop("notes")[0].startswith("Ranks differ (2, 3, 4)")
    assert body == {"target": "a", "format": "mlx", "modules": 14, "checked": False}
