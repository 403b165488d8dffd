"""One cause and what to do about it, where a folder holds something else or an adapter of another model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from adapters_core.container import AdapterContainer
from adapters_core.errors import InvalidAdapterError, grouped
from adapters_core.formats.unplaced import read_unplaced
from tests.models import adapter_tensors, adapter_values, make_adapter, tiny_llama, write_adapter

PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
MLX = adapter_values()
CONFIG = "adapter_config.json"


def _refused(folder: Path) -> InvalidAdapterError:
    with pytest.raises(InvalidAdapterError) as refused:
        AdapterContainer.from_directory(folder).check(tiny_llama())
    return refused.value


@pytest.mark.parametrize(
    ("values", "names", "cause"),
    [
        (PEFT, ["adapter_model.bin"], "which torch wrote.*weights_only=True.*'adapter_model.safetensors'"),
        (PEFT, ["adapter_model-00001-of-00002.safetensors"], r"lie in parts.*Join them"),
        (PEFT, ["adapters.safetensors"], "the file of mlx-lm's format, beside a config of PEFT's"),
        (PEFT, ["checkpoint-20", "checkpoint-100"], "steps of its training, .* the folder checkpoint-100"),
        (PEFT, ["pytorch_lora_weights.safetensors"], "a LoRA of an image model, as diffusers writes it"),
        (PEFT, ["lora.safetensors"], "rename them: `mv lora.safetensors adapter_model.safetensors`"),
        (MLX, ["adapter_model.safetensors"], "the file of PEFT's format, beside a config of mlx-lm's"),
        (MLX, ["adapters.npz"], r"as mlx-lm wrote adapters up to 0\.5.*mx.load\('adapters.npz'\)"),
        (MLX, ["0000100_adapters.safetensors", "0000200_adapters.safetensors"], "`cp 0000200_adapters"),
        (MLX, ["adapter-f16.gguf"], "llama.cpp's format"),
        (None, ["adapters.safetensors"], 'write one with the rank R and the scale S.*"lora_parameters"'),
        (None, ["adapter_model.safetensors"], "that PEFT's save_pretrained writes with it"),
        (None, ["adapters.npz"], "There is no adapter_config.json either"),
        (None, ["config.json", "model.safetensors", "tokenizer.json"], "a whole model.*`mlx-graft serve"),
        (None, ["config.json", "model-00001-of-00004.safetensors"], "the folder of a whole model"),
    ],
)
def test_what_is_there_instead_is_told_first(
    tmp_path: Path, values: dict[str, object] | None, names: list[str], cause: str
) -> None:
    folder = write_adapter(tmp_path / "a", values, None)
    for name in names:
        (folder / name).write_bytes(b"")
    for read in (AdapterContainer.from_directory, read_unplaced):
        with pytest.raises(InvalidAdapterError) as refused:
            read(folder)
        (told,) = refused.value.causes
        assert re.search(cause, told), told
        assert refused.value.told[0] == refused.value.details[0] == told
        assert told in str(refused.value)


def test_a_name_that_a_shell_would_obey_is_in_no_command(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", PEFT, None)
    (folder / "x'; touch owned;'.bin").write_bytes(b"")
    assert "touch" not in str(_refused(folder))


@pytest.mark.parametrize("form", ["npz", "parts"])
def test_the_commands_that_are_told_mend_it(tmp_path: Path, form: str) -> None:
    tensors = adapter_tensors(tiny_llama(), MLX)
    folder = write_adapter(tmp_path / "a", MLX if form == "npz" else PEFT, None)
    if form == "npz":
        mx.savez(str(folder / "adapters.npz"), **tensors)
    else:
        for number, name in enumerate(sorted(tensors)):
            part = folder / f"adapter_model-{number:05d}-of-{len(tensors):05d}.safetensors"
            mx.save_safetensors(str(part), {name: tensors[name]})
    (command,) = re.findall(r"`(python -c .*?)`", str(_refused(folder)))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(command, shell=True, cwd=folder, check=True, env=os.environ | {"PATH": path})
    file = "adapters.safetensors" if form == "npz" else "adapter_model.safetensors"
    written = mx.load(str(folder / file))
    assert isinstance(written, dict)
    assert written.keys() == tensors.keys()
    assert all(mx.array_equal(written[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("rename", "values", "cause"),
    [
        (r"base_model.model.\1.lora_A.weight", MLX, "named as in PEFT's format"),
        (r"\1.lora_a", PEFT, "named as in mlx-lm's format"),
        (r"lora_unet_\1.lora_down.weight", PEFT, "a LoRA of an image model"),
        (r"diffusion_model.double_blocks.\1.lora_A.weight", PEFT, "a LoRA of an image model"),
        (r"transformer.single_transformer_blocks.\1.lora_A.weight", PEFT, "a LoRA of an image model"),
        (r"\1.A", MLX, "by an older mlx-vlm"),
        (r"\1.weight", PEFT, "whole weights and no factors"),
    ],
)
def test_tensors_of_another_tool_are_one_cause(
    tmp_path: Path, rename: str, values: dict[str, object], cause: str
) -> None:
    names = {re.sub("(.*)", rename, f"model.layers.{layer}.q_proj", count=1) for layer in range(50)}
    folder = write_adapter(tmp_path / "a", values, None)
    file = "adapter_model.safetensors" if values is PEFT else "adapters.safetensors"
    mx.save_safetensors(str(folder / file), {name: mx.ones((4, 4)) for name in names})
    error = _refused(folder)
    assert cause in error.causes[0]
    assert len(str(error)) < 2500


def test_another_base_is_one_cause(tmp_path: Path) -> None:
    wide = make_adapter(tmp_path / "wide", tiny_llama(hidden_size=128))
    error = _refused(wide)
    assert error.causes == ("the adapter was trained on another base: its hidden size is 128, this one's 64",)
    assert (len(error.problems), len(error.told)) == (18, 1 + 3)


def test_a_deeper_base_is_one_cause(tmp_path: Path) -> None:
    deep = make_adapter(tmp_path / "deep", tiny_llama(num_hidden_layers=6))
    assert "it has tensors for layer 5, and the last of this model's layers is 2" in _refused(deep).causes[0]


def test_another_architecture_is_one_cause_with_the_base_it_names(tmp_path: Path) -> None:
    values = MLX | {"model": "/home/me/gpt2"}
    tensors = {
        f"transformer.h.{layer}.attn.c_attn.lora_{side}": mx.ones((4, 4))
        for layer in range(9)
        for side in "ab"
    }
    (cause,) = _refused(write_adapter(tmp_path / "a", values, tensors)).causes
    assert cause.startswith("the adapter is for another architecture: none of its 9 modules")
    assert cause.endswith("adapter_config.json names the base 'gpt2'.")
    assert "/home" not in cause


def test_modules_that_lie_elsewhere_are_one_cause(tmp_path: Path) -> None:
    head = adapter_values(keys=["lm_head"])
    alone = write_adapter(tmp_path / "head", head, adapter_tensors(tiny_llama(), head))
    with pytest.raises(InvalidAdapterError, match="this model's head is tied to its embedding"):
        AdapterContainer.from_directory(alone).check(tiny_llama(tie_word_embeddings=True))
    tensors = {f"language_model.{name}": one for name, one in adapter_tensors(tiny_llama(), MLX).items()}
    keys = sorted({name.rpartition(".")[0] for name in tensors})
    inner = write_adapter(tmp_path / "inner", adapter_values(keys=keys), tensors)
    (cause,) = _refused(inner).causes
    assert "whose language model lies in language_model, as mlx-vlm has it" in cause
    assert len(str(_refused(inner))) < 2500


def test_whole_weights_beside_factors_are_told(tmp_path: Path) -> None:
    tensors = adapter_tensors(tiny_llama(), MLX) | {"model.embed_tokens.weight": mx.ones((96, 64))}
    (problem,) = _refused(write_adapter(tmp_path / "a", MLX | {"peft_type": "LORA"}, tensors)).problems
    assert problem.endswith("put the adapter into it with `mlx_lm.fuse`")


def test_a_model_that_was_trained_whole_is_one_sentence(tmp_path: Path) -> None:
    values = {"fine_tune_type": "full", "num_layers": 4, "lora_parameters": None}
    (problem,) = _refused(write_adapter(tmp_path / "a", values, adapter_tensors(tiny_llama(), MLX))).problems
    assert "`mlx_lm.fuse --model BASE" in problem


def test_one_rank_for_all_that_is_not_the_configs_is_one_cause(tmp_path: Path) -> None:
    model = tiny_llama()
    folder = write_adapter(tmp_path / "a", adapter_values(rank=8), adapter_tensors(model, MLX))
    assert "the tensors are of rank 4, and adapter_config.json says 8" in _refused(folder).causes[0]


def test_empty_tensors_are_one_sentence_with_what_to_set(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", PEFT, None)
    names = [f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight" for layer in range(200)]
    save_file({name: np.zeros(0, np.float32) for name in names}, folder / "adapter_model.safetensors")
    (problem,) = _refused(folder).problems
    assert "200 of 200 tensors are empty, such as base_model.model" in problem
    assert "stage3_gather_16bit_weights_on_model_save" in problem


@pytest.mark.parametrize(("step", "how"), [(1.0, "which changes no value"), (0.1, "each value rounded once")])
def test_float64_is_served_in_float32_with_a_note(tmp_path: Path, step: float, how: str) -> None:
    model = tiny_llama()
    tensors = {name: np.array(tensor) for name, tensor in adapter_tensors(model, MLX).items()}
    wide = {name: np.round(tensor.astype(np.float64) * 8) * step for name, tensor in tensors.items()}
    folder = write_adapter(tmp_path / "wide", MLX, None)
    save_file(wide, folder / "adapters.safetensors")
    narrow = write_adapter(tmp_path / "narrow", MLX, None)
    save_file({name: one.astype(np.float32) for name, one in wide.items()}, narrow / "adapters.safetensors")
    found, same = (AdapterContainer.from_directory(each) for each in (folder, narrow))
    assert found.digest == same.digest
    (note,) = found.place(model).warnings
    assert f"has 18 tensor(s) in float64; they are served in float32, {how}." in note
    assert read_unplaced(folder).warnings == (note,)


def test_problems_of_one_kind_are_three_and_a_count() -> None:
    many = [f"tensor model.layers.{at}.q.lora_a: expected shape (8, {at})" for at in range(344)]
    assert grouped([*many, "another"]) == [many[0], many[1], f"{many[2]} (and 341 more like this)", "another"]
    assert grouped(many[:3]) == many[:3]
    assert grouped([]) == []
