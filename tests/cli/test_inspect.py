"""`mlx-graft adapters inspect`: without a server, with a model and without."""

from __future__ import annotations

import json
from pathlib import Path

from tests.models import adapter_tensors, adapter_values, make_adapter, tiny_llama, write_adapter
from tests.peft.fixtures import adapter, model_folder

from .conftest import Program


def test_a_folder_alone(command: Program, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", tiny_llama(), rank=4, scale=2.5)
    done = command("adapters", "inspect", str(folder))
    assert (done.code, done.err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in done.out.splitlines() if not line.startswith("Whether"))
    assert {name: lines[name].strip() for name in ("folder", "format", "modules", "names", "layers")} == {
        "folder": "a",
        "format": "mlx",
        "modules": "9",
        "names": "k_proj 3, q_proj 3, v_proj 3",
        "layers": "0-2",
    }
    assert [lines[name].strip() for name in ("ranks", "scales", "dtypes")] == ["4", "2.5", "float32"]
    assert done.out.endswith("Whether it fits a model is seen with --model.\n")


def test_with_a_model_it_says_whether_it_fits(command: Program) -> None:
    done = command("adapters", "inspect", str(adapter("plain")), "--model", str(model_folder("llama")))
    assert (done.code, done.err) == (0, "")
    assert "linear 14" in done.out
    assert "sha256:" in done.out
    assert done.out.endswith("It fits llama.\n")


def test_another_model_is_one_cause_and_a_few_problems(command: Program) -> None:
    path, other = str(adapter("rslora")), str(model_folder("gpt2"))
    done = command("adapters", "inspect", path, "--model", other)
    assert (done.code, done.out) == (1, "")
    heading, cause, *problems = done.err.splitlines()
    assert heading == "error: rslora cannot be used, for 8 reason(s):"
    assert cause.startswith("error: the adapter is for another architecture: none of its 4 modules, such as")
    assert cause.endswith("adapter_config.json names the base 'llama'.")
    assert len(problems) == 3
    assert problems[-1].endswith("(and 5 more like this)")
    as_json = command("adapters", "inspect", path, "--model", other, "--json")
    assert (as_json.code, as_json.err) == (1, "")
    body = json.loads(as_json.out)
    assert (body["fits"], len(body["problems"])) == (False, 1 + 8)
    assert [f"error: {problem}" for problem in body["problems"][:3]] == [cause, *problems[:2]]


def test_json_is_the_report(command: Program) -> None:
    path, base = str(adapter("patterns")), str(model_folder("llama"))
    alone = json.loads(command("adapters", "inspect", path, "--json").out)
    fitted = json.loads(command("adapters", "inspect", path, "--model", base, "--json").out)
    assert (alone.pop("fits"), fitted.pop("fits")) == (None, True)
    assert (alone.pop("kinds"), fitted.pop("kinds")) == ({}, {"linear": 14})
    assert (alone.pop("digest"), fitted.pop("digest")[:7]) == (None, "sha256:")
    assert alone == fitted
    assert (alone["format"], alone["base_name"], alone["ranks"]) == ("peft", "tiny/llama", [2, 3, 4])


def test_warnings_and_doubts_are_told(command: Program, tmp_path: Path) -> None:
    base = tiny_llama()
    values = adapter_values(keys=["model.embed_tokens"], scale=0.0) | {"model": "someone/Other"}
    folder = write_adapter(tmp_path / "a", values, adapter_tensors(base, values))
    done = command("adapters", "inspect", str(folder))
    assert done.err.startswith("warning: The adapter changes nothing")
    assert "does not say whether it is an embedding" in done.out
    done = command("adapters", "inspect", str(adapter("plain")), "--model", str(model_folder("llama")))
    assert done.err == ""


def test_what_is_no_folder_is_a_sentence(command: Program, tmp_path: Path) -> None:
    missing = command("adapters", "inspect", str(tmp_path / "none"))
    assert (missing.code, missing.out) == (2, "")
    empty = command("adapters", "inspect", str(tmp_path))
    assert empty.code == 1
    assert len(empty.err.splitlines()) == 3
    folder = str(adapter("plain"))
    assert command("adapters", "inspect", folder, "--model", str(tmp_path / "none")).code == 2
    not_one = command("adapters", "inspect", folder, "--model", str(tmp_path))
    assert not_one.code == 1
    assert "cannot be loaded" in not_one.err


def test_a_scale_in_doubt_is_told_and_can_be_given(command: Program, tmp_path: Path) -> None:
    values = {"lora_layers": 16, "lora_parameters": {"rank": 4, "alpha": 8, "scale": 2.0, "dropout": 0.0}}
    old = write_adapter(tmp_path / "old", values, adapter_tensors(tiny_llama(), adapter_values()))
    doubt = command("adapters", "inspect", str(old))
    assert (doubt.code, "scale * alpha / rank = 4" in doubt.err) == (0, True)
    chosen = command("adapters", "inspect", str(old), "--scale", "4")
    assert ("scales   4" in chosen.out, "The scale 4 was given" in chosen.err) == (True, True)
    converted = command("convert", str(old), str(tmp_path / "p"), "--to", "peft", "--scale", "4")
    assert (converted.code, "The scale 4 was given" in converted.err) == (0, True)
    assert "scales   4" in command("adapters", "inspect", str(tmp_path / "p")).out
    refused = command("adapters", "inspect", str(tmp_path / "p"), "--scale", "4")
    assert (refused.code, "no other can be given for all" in refused.err) == (1, True)
