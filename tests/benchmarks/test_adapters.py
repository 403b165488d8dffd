"""The benchmark's adapters are real ones: mlx-lm and adapters_core load them, and they change answers."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from adapters_core.container import AdapterContainer
from benchmarks.adapters import KINDS, AdapterKind, KindName, write_adapters

TOKENS = mx.array([[5, 400, 77, 4000]])


@pytest.mark.parametrize(("kind", "modules"), [(KindName.RANK_8_QV, 4), (KindName.RANK_16_ALL, 14)])
def test_they_fit_the_model_and_each_changes_it_a_little(
    tiny_model_path: Path, tmp_path: Path, kind: KindName, modules: int
) -> None:
    base, _ = load_model(tiny_model_path)
    expected = base(TOKENS)
    changed = []
    for folder in write_adapters(tiny_model_path, tmp_path / "adapters", 2, KINDS[kind], seed=3):
        weights = AdapterContainer.from_directory(folder).check(base)
        assert len(weights) == modules
        assert {part.lora_a.shape[1] for part in weights.values()} == {KINDS[kind].rank}
        model, _ = load_model(tiny_model_path)
        changed.append(load_adapters(model, str(folder))(TOKENS))
        moved = mx.linalg.norm(changed[-1] - expected) / mx.linalg.norm(expected)
        assert 0.001 < float(moved) < 0.7
    assert not mx.allclose(changed[0], changed[1], atol=1e-3)


def test_they_depend_on_the_seed_alone(tiny_model_path: Path, tmp_path: Path) -> None:
    def digests(name: str, seed: int) -> list[str]:
        mx.random.seed(len(name))
        folders = write_adapters(tiny_model_path, tmp_path / name, 2, KINDS[KindName.RANK_8_QV], seed)
        return [AdapterContainer.from_directory(folder).digest for folder in folders]

    first = digests("first", 1)
    assert len(set(first)) == 2
    assert digests("again", 1) == first
    assert not set(digests("other", 10)) & set(first)


def test_a_kind_that_matches_nothing_says_what_there_is(tiny_model_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"named query or key .*self_attn\.q_proj.*rank16-all"):
        write_adapters(tiny_model_path, tmp_path / "adapters", 1, AdapterKind(4, ("query", "key")), seed=0)
    assert not (tmp_path / "adapters").exists()
