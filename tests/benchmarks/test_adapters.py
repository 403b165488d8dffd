"""The benchmark's adapters are real ones: mlx-lm and adapters_core load them, and they change answers."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import mlx.core as mx
import pytest
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from adapters_core.container import AdapterContainer
from benchmarks.adapters import ATTENTION, RANK_8_QV, RANK_16_ALL, AdapterKind, write_adapters
from benchmarks.library import AdapterLibrary, AdapterSet, tensor_bytes

TOKENS = mx.array([[5, 400, 77, 4000]])


@pytest.mark.parametrize(
    ("kind", "modules"), [(RANK_8_QV, 4), (RANK_16_ALL, 14), (AdapterKind(3, ATTENTION, dora=True), 8)]
)
def test_they_fit_the_model_and_each_changes_it_a_little(
    tiny_model_path: Path, tmp_path: Path, kind: AdapterKind, modules: int
) -> None:
    base, _ = load_model(tiny_model_path)
    expected = base(TOKENS)
    changed = []
    folders = {0: tmp_path / "first", 7: tmp_path / "seventh"}
    write_adapters(tiny_model_path, {kind: folders}, seed=3)
    for folder in folders.values():
        weights = AdapterContainer.from_directory(folder).check(base)
        assert len(weights) == modules
        assert {part.lora_a.shape[1] for part in weights.values()} == {kind.rank}
        model, _ = load_model(tiny_model_path)
        changed.append(load_adapters(model, str(folder))(TOKENS))
        moved = mx.linalg.norm(changed[-1] - expected) / mx.linalg.norm(expected)
        assert 0.001 < float(moved) < 0.9
    assert not mx.allclose(changed[0], changed[1], atol=1e-3)


def test_they_depend_on_the_seed_and_the_number_alone(tiny_model_path: Path, tmp_path: Path) -> None:
    def digests(name: str, seed: int, *numbers: int) -> list[str]:
        mx.random.seed(len(name))
        folders = {number: tmp_path / name / str(number) for number in numbers}
        write_adapters(tiny_model_path, {RANK_8_QV: folders}, seed)
        return [AdapterContainer.from_directory(folder).digest for folder in folders.values()]

    first = digests("first", 1, 0, 1, 2)
    assert len(set(first)) == 3
    assert digests("again", 1, 2, 0) == [first[2], first[0]]
    assert not set(digests("other", 10, 0, 1, 2)) & set(first)


def test_no_tensor_of_two_adapters_is_the_same(tiny_model_path: Path, tmp_path: Path) -> None:
    folders = {number: tmp_path / str(number) for number in (0, 1, 100)}
    write_adapters(tiny_model_path, {RANK_16_ALL: folders}, seed=0)
    first, *others = (load_tensors(folder / "adapters.safetensors") for folder in folders.values())
    for name, tensor in first.items():
        for other in others:
            assert not mx.array_equal(tensor, other[name])
            assert mx.array_equal(mx.sort(tensor.flatten()), mx.sort(other[name].flatten()))


def load_tensors(path: Path) -> dict[str, mx.array]:
    return cast("dict[str, mx.array]", mx.load(str(path)))


def test_kinds_are_named_after_what_they_are() -> None:
    kinds = (RANK_8_QV, RANK_16_ALL, AdapterKind(4, ATTENTION, dora=True), AdapterKind(2, ("o_proj",)))
    assert [*map(str, kinds)] == ["rank8-qv", "rank16-all", "dora4-attention", "rank2-o_proj"]


def test_a_library_writes_each_adapter_once_and_links_it(tiny_model_path: Path, tmp_path: Path) -> None:
    library = AdapterLibrary(tiny_model_path, tmp_path, seed=0)
    small, large = (AdapterSet(RANK_8_QV, count) for count in (2, 3))
    other = AdapterSet(RANK_16_ALL, 1)
    roots = [library.root(sets) for sets in ([small], [large, other], [small], [])]
    assert roots[0] == roots[2]
    names = [sorted(folder.name for folder in root.iterdir()) for root in roots]
    assert names[:2] == [["rank8-qv-0", "rank8-qv-1"], sorted([*large.ids, *other.ids])]
    assert names[3] == []
    files = [root / "rank8-qv-1" / "adapters.safetensors" for root in roots[:2]]
    assert files[0].samefile(files[1])
    tensors = load_tensors(files[0])
    assert tensor_bytes(files[0].parent) == sum(tensor.nbytes for tensor in tensors.values())


def test_a_kind_that_matches_nothing_says_what_there_is(tiny_model_path: Path, tmp_path: Path) -> None:
    folders = {0: tmp_path / "adapters"}
    with pytest.raises(ValueError, match=r"named query or key .*self_attn\.q_proj.*: choose a model"):
        write_adapters(tiny_model_path, {AdapterKind(4, ("query", "key")): folders}, seed=0)
    assert not (tmp_path / "adapters").exists()
