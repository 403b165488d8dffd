"""PEFT folders under an adapters root: found, guarded against links, weighed before they are read, served."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from adapters_core.container import AdapterContainer
from adapters_core.formats.peft.copies import copies_bytes
from adapters_core.formats.peft.writing import peft_files
from adapters_core.formats.reading import least_memory_bytes
from adapters_core.formats.weights import PEFT_WEIGHTS_FILE, WEIGHTS_FILE, read_weights
from server.adapters.errors import PathNotAllowedError
from server.adapters.folder import AdapterFolders
from tests.adapters.support import read_model, site, write_model
from tests.models import make_adapter
from tests.peft import fixtures


def test_a_folder_is_found_on_demand_and_a_link_out_of_the_root_is_not_followed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    fixtures.changed(root / "pirate", "plain")
    folders = AdapterFolders(root)
    found = folders.on_demand("pirate")
    assert found is not None
    assert AdapterContainer.from_directory(found.path).format == "peft"
    assert folders.available("base", ()) == ["pirate"]
    file = root / "pirate" / PEFT_WEIGHTS_FILE
    file.rename(tmp_path / "outside.safetensors")
    file.symlink_to(tmp_path / "outside.safetensors")
    assert folders.on_demand("pirate") is None
    with pytest.raises(PathNotAllowedError, match=PEFT_WEIGHTS_FILE):
        folders.find("pirate")


def test_copies_of_the_base_do_not_count_as_memory_that_an_adapter_needs(tmp_path: Path) -> None:
    folder = fixtures.changed(tmp_path / "a", "embedding")
    tensors = read_weights(folder, PEFT_WEIGHTS_FILE).tensors
    factors = sum(tensor.nbytes for name, tensor in tensors.items() if ".lora_" in name)
    assert least_memory_bytes(folder) == factors // 2
    (folder / PEFT_WEIGHTS_FILE).write_bytes((1 << 40).to_bytes(8, "little") + b"[" * 100_000)
    assert least_memory_bytes(folder) == 0
    (folder / PEFT_WEIGHTS_FILE).write_bytes((2).to_bytes(8, "little") + b"[]")
    assert least_memory_bytes(folder) == 0


def test_the_file_that_will_be_read_is_weighed_with_all_that_is_in_it(tmp_path: Path) -> None:
    folder = fixtures.changed(tmp_path / "a", "plain")
    least_bytes = least_memory_bytes(folder)
    (folder / WEIGHTS_FILE).write_bytes(b"x")  # the other format's, which nobody reads
    assert least_memory_bytes(folder) == least_bytes > 0
    with (folder / PEFT_WEIGHTS_FILE).open("r+b") as file:
        file.truncate(1 << 32)  # a sparse file
    header_bytes = 1 << 24
    assert least_memory_bytes(folder) == ((1 << 32) - header_bytes) // 2
    assert least_memory_bytes(folder, None, 1 << 30) == ((3 << 30) - header_bytes) // 2
    assert least_memory_bytes(folder, None, 1 << 32) == least_bytes
    assert copies_bytes(fixtures.model("llama")) == 2 * 64 * 32 * 4


def test_a_file_with_a_module_for_each_of_many_experts_is_read(tmp_path: Path) -> None:
    names = [
        f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.down_proj.lora_A.weight"
        for layer in range(90)
        for expert in range(128)
    ]
    file = tmp_path / PEFT_WEIGHTS_FILE
    mx.save_safetensors(str(file), dict.fromkeys(names, mx.ones(1)))
    with file.open("rb") as opened:
        assert int.from_bytes(opened.read(8), "little") > 1 << 20
    assert len(read_weights(tmp_path, PEFT_WEIGHTS_FILE).tensors) == len(names)


async def test_the_same_adapter_in_both_formats_answers_the_same_over_http(tmp_path: Path) -> None:
    model_path = write_model(tmp_path / "models" / "tiny")
    model = read_model(model_path)
    root = tmp_path / "adapters"
    for kind in ("lora", "dora"):
        folder = make_adapter(root / kind, model, kind)
        weights = AdapterContainer.from_directory(folder).check(model)
        peft_files(weights, kind, (), base_name="tiny/other").write(root / f"{kind}-peft")
    async with site(model_path, root) as started:
        base = await started.says(None)
        for kind in ("lora", "dora"):
            assert await started.says(kind) == await started.says(f"{kind}-peft") != base
        shown = await started.call("GET", "/v1/adapters/dora-peft")
        assert (shown["format"], shown["type"], shown["version"]) == ("peft", "dora", 1)
        assert (await started.call("GET", "/v1/adapters/dora"))["format"] == "mlx"
