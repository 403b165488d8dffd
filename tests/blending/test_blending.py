"""Blends by their own laws: exact sums, the best rank, TIES by hand, DARE's mask, and every refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from adapters_core.blending.blend import MAX_PARTS, Blend, BlendMethod, BlendOptions, BlendPart, blend
from adapters_core.blending.deltas import DisjointMean, drop, trim
from adapters_core.blending.ranks import EXACT_SIDE, truncate_matrix, truncate_product
from adapters_core.errors import InvalidBlendError
from adapters_core.layers.module_weights import ModuleWeights
from tests.blending.parts import delta, linear, switch
from tests.models import relative_error


def mixed_parts() -> list[BlendPart]:
    """Of different ranks, scales, signs and modules, for a linear layer and one of experts."""
    return [
        BlendPart("a", 0.7, {"x": linear(1), "y": switch(2)}),
        BlendPart("b", -1.3, {"x": linear(3, rank=7, scale=0.3)}),
        BlendPart("c", 2.0, {"y": switch(4, rank=3), "z": linear(5, (9, 30), rank=2)}),
    ]


def summed(parts: list[BlendPart]) -> dict[str, np.ndarray]:
    """Σ weight · delta, in float64."""
    total: dict[str, np.ndarray] = {}
    for part in parts:
        for path, module in part.modules.items():
            total[path] = total.get(path, 0) + part.weight * delta(module)
    return total


def deltas(result: Blend) -> dict[str, np.ndarray]:
    return {path: delta(module) for path, module in result.modules.items()}


def same(left: Blend, right: Blend) -> bool:
    """Whether two blends are equal bit for bit."""
    return left.modules.keys() == right.modules.keys() and all(
        np.array_equal(np.array(getattr(mine, name)), np.array(getattr(right.modules[path], name)))
        for path, mine in left.modules.items()
        for name in ("lora_a", "lora_b")
    )


def test_linear_is_the_sum_of_the_deltas() -> None:
    parts = mixed_parts()
    result = blend(parts, BlendOptions())
    for path, expected in summed(parts).items():
        assert relative_error(deltas(result)[path], expected) < 1e-6
    assert {path: module.lora_a.shape for path, module in result.modules.items()} == {
        "x": (20, 11),
        "y": (3, 5, 12),
        "z": (9, 2),
    }
    assert all(
        module.scale == 1.0 and module.lora_b.dtype == mx.float32 for module in result.modules.values()
    )
    assert (result.report.modules, result.report.rank) == (3, 11)
    assert (result.report.error_worst, result.report.worst_module) == (0.0, None)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_loses_nothing(dtype: mx.Dtype) -> None:
    def halved(module: ModuleWeights) -> ModuleWeights:
        return replace(module, lora_a=module.lora_a.astype(dtype), lora_b=module.lora_b.astype(dtype))

    parts = [
        replace(part, modules={path: halved(m) for path, m in part.modules.items()}) for part in mixed_parts()
    ]
    for path, expected in summed(parts).items():
        assert relative_error(deltas(blend(parts, BlendOptions()))[path], expected) < 1e-6


def test_svd_keeps_the_best_of_a_rank_and_says_what_it_lost() -> None:
    parts = mixed_parts()
    result = blend(parts, BlendOptions("svd", rank=3))
    errors = {}
    for path, exact in summed(parts).items():
        matrices = exact if exact.ndim == 3 else exact[None]
        u, values, v = np.linalg.svd(matrices, full_matrices=False)
        values[:, 3:] = 0
        assert relative_error(deltas(result)[path], np.squeeze(u * values[:, None, :] @ v)) < 1e-5
        errors[path] = relative_error(deltas(result)[path], exact)
    assert result.report.rank == 3
    assert result.report.worst_module == max(errors, key=lambda path: errors[path])
    assert result.report.error_worst == pytest.approx(max(errors.values()), rel=1e-4)
    assert result.report.error_mean == pytest.approx(sum(errors.values()) / 3, rel=1e-4)


def test_svd_defaults_to_the_largest_rank_and_never_pads() -> None:
    result = blend(mixed_parts(), BlendOptions("svd"))
    ranks = {path: module.lora_a.shape[1] for path, module in result.modules.items()}
    assert ranks == {"x": 7, "y": 5, "z": 2}
    exact = blend(mixed_parts(), BlendOptions("svd", rank=4000))
    assert [module.lora_a.shape[1] for module in exact.modules.values()] == [11, 5, 2]
    assert exact.report.error_worst < 1e-7


def test_ties_by_hand() -> None:
    assert trim(np.array([[3.0, -1.0], [0.5, -4.0]], np.float32), 0.5).tolist() == [[3, 0], [0, -4]]
    assert trim(np.array([1.0, -1.0, 1.0, 2.0], np.float32), 0.5).tolist() == [1, 0, 0, 2]
    assert trim(np.array([1.0, 2.0], np.float32), 0.1).tolist() == [0, 0]
    assert trim(np.array([1.0, 2.0], np.float32), 1.0).tolist() == [1, 2]
    mean = DisjointMean((5,))
    for entries, weight in (([4, 0, -1, 2, 0], 1.0), ([2, -3, 5, -1, 0], 0.5), ([-1, -1, -2, -1, 0], 1.0)):
        mean.add(np.array(entries, np.float32), weight)
    # Elected: + (5), - (4), + (2), none (0), none; zeros are not counted.
    assert mean.merged().tolist() == [(4 + 1) / 2, (-1.5 - 1) / 2, 2.5, 0, 0]


def test_a_subtracted_part_votes_for_what_it_adds() -> None:
    mean = DisjointMean((2,))
    mean.add(np.array([1, 1], np.float32), 1.0)
    mean.add(np.array([0.5, -2], np.float32), -1.0)
    assert mean.merged().tolist() == [1, 1.5]


def test_ties_of_equal_adapters_is_the_adapter() -> None:
    modules = {"x": linear(1), "y": switch(2)}
    result = blend([BlendPart(name, 1.0, modules) for name in "abc"], BlendOptions("ties", density=1.0))
    for path, module in modules.items():
        assert relative_error(deltas(result)[path], delta(module)) < 1e-5
    assert result.report.error_worst < 1e-5


def test_dare_drops_at_random_and_keeps_the_mean() -> None:
    ones = np.ones((400, 500), np.float32)
    dropped = drop(ones, 0.3, np.random.default_rng(1))
    assert set(np.unique(dropped).tolist()) == {0.0, float(np.float32(1) / np.float32(0.3))}
    assert dropped.mean() == pytest.approx(1.0, abs=0.01)
    assert np.array_equal(drop(ones, 1.0, np.random.default_rng(1)), ones)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_depends_on_the_seed_alone(method: BlendMethod) -> None:
    parts = mixed_parts()

    def made(seed: int | None) -> Blend:
        return blend(parts, BlendOptions(method, density=0.5, seed=seed))

    assert same(made(3), made(3))
    assert same(made(None), made(0))
    assert not same(made(3), made(4))


def test_dare_masks_each_part_and_module_apart() -> None:
    twice = {"x": linear(1), "y": linear(1)}
    options = BlendOptions("dare_linear", density=0.5, rank=16)
    one = deltas(blend([BlendPart("a", 1.0, twice)], options))
    assert relative_error(one["x"], one["y"]) > 0.5
    both = deltas(blend([BlendPart("a", 0.5, twice), BlendPart("b", 0.5, twice)], options))
    entries = both["x"] / delta(twice["x"])
    # Kept by both, by one or by neither: 2, 1 or 0 times the entry.
    near = np.abs(entries[:, :, None] - np.arange(3)) < 1e-3
    assert near.any(axis=2).all()
    assert near.any(axis=(0, 1)).all()


def test_dare_linear_at_full_density_is_the_sum() -> None:
    parts = mixed_parts()
    result = blend(parts, BlendOptions("dare_linear", density=1.0, rank=20))
    for path, expected in summed(parts).items():
        assert relative_error(deltas(result)[path], expected) < 1e-5


def test_a_weight_of_nothing_is_nothing() -> None:
    parts = mixed_parts()
    for options in (BlendOptions(), BlendOptions("ties", density=0.5)):
        more = [*parts, BlendPart("d", 0.0, {"x": linear(9), "w": linear(8)})]
        assert same(blend(more, options), blend(parts, options))


def test_biases_are_summed() -> None:
    biases = [np.arange(16.0), np.ones(16)]
    parts = [
        BlendPart("a", 0.5, {"x": replace(linear(1), bias=mx.array(biases[0], mx.float32))}),
        BlendPart("b", -1.0, {"x": replace(linear(2, scale=3.0), bias=mx.array(biases[1], mx.float32))}),
        BlendPart("c", 1.0, {"x": linear(3)}),
    ]
    for options in (BlendOptions(), BlendOptions("svd", rank=2)):
        bias = blend(parts, options).modules["x"].bias
        assert bias is not None
        np.testing.assert_allclose(np.array(bias), 0.5 * 2.0 * biases[0] - 3.0 * biases[1], rtol=1e-6)
    with pytest.raises(InvalidBlendError, match="'a' has biases, for which ties is not defined"):
        blend(parts, BlendOptions("ties", density=0.5))


@pytest.mark.parametrize("options", [BlendOptions(), BlendOptions("ties", density=0.5)])
def test_embeddings_adapted_for_look_ups_alone_stay_so(options: BlendOptions) -> None:
    apart = [
        BlendPart(name, 1.0, {"x": replace(linear(seed), lookup_only=True)}) for seed, name in enumerate("ab")
    ]
    assert blend(apart, options).modules["x"].lookup_only
    with pytest.raises(InvalidBlendError, match="x: some of the adapters change the head that is tied to it"):
        blend([*apart, BlendPart("c", 1.0, {"x": linear(3)})], options)


def test_large_matrices_are_truncated_without_a_full_decomposition() -> None:
    rng = np.random.default_rng(0)
    side = EXACT_SIDE + 1
    signal = rng.normal(0, 1, (side, 6)) @ rng.normal(0, 1, (6, side + 50))
    matrix = (signal + rng.normal(0, 0.05, signal.shape)).astype(np.float32)
    found = truncate_matrix(matrix, 6)
    actual = float(np.linalg.norm(matrix - found.left @ found.right) / np.linalg.norm(matrix))
    values = np.linalg.svd(matrix, compute_uv=False)
    best = float(np.linalg.norm(values[6:]) / np.linalg.norm(values))
    assert actual == pytest.approx(best, rel=1e-3)
    assert np.sqrt(found.lost / found.size) == pytest.approx(actual, rel=1e-3)


def test_nothing_has_no_error() -> None:
    zeros = np.zeros((4, 2), np.float32)
    for found in (truncate_product(zeros, zeros.T, 1), truncate_matrix(zeros, 1)):
        assert (found.size, found.lost) == (0.0, 0.0)
    cancelling = [BlendPart("a", 1.0, {"x": linear(1)}), BlendPart("b", -1.0, {"x": linear(1)})]
    result = blend(cancelling, BlendOptions("ties", density=0.5))
    assert np.abs(deltas(result)["x"]).max() == 0
    assert result.report.error_worst == 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (BlendOptions("mean"), "method: expected one of linear, svd"),  # type: ignore[arg-type]
        (BlendOptions("ties"), "density: ties needs a number above 0 and at most 1, none was given"),
        (BlendOptions("ties", density=0.0), "density: ties needs"),
        (BlendOptions("dare_ties", density=1.01), "density: dare_ties needs"),
        (BlendOptions("dare_linear", density=float("nan")), "density: dare_linear needs"),
        (BlendOptions("svd", density=0.5), "density: svd keeps every entry"),
        (BlendOptions("linear", rank=4), "rank: linear is exact"),
        (BlendOptions("svd", rank=0), "rank: expected a whole number from 1 to 4096, got 0"),
        (BlendOptions("svd", rank=5000), "rank: expected"),
        (BlendOptions("ties", density=0.5, seed=1), "seed: ties draws nothing"),
        (BlendOptions("dare_ties", density=0.5, seed=-1), "seed: expected"),
    ],
)
def test_wrong_options(options: BlendOptions, problem: str) -> None:
    assert [found for found in options.problems() if found.startswith(problem)]
    with pytest.raises(InvalidBlendError) as caught:
        blend(mixed_parts(), options)
    assert caught.value.problems == tuple(options.problems())


def test_every_problem_is_named() -> None:
    dora = replace(linear(1), magnitude=mx.ones(16))
    parts = [
        BlendPart("a", float("inf"), {"x": linear(1)}),
        BlendPart("d", 1.0, {"x": dora}),
        BlendPart("e", 1.0, {"x": linear(1, (20, 17))}),
    ]
    with pytest.raises(InvalidBlendError) as caught:
        blend(parts, BlendOptions("svd", density=0.5))
    shown = str(caught.value)
    for problem in (
        "density: svd keeps",
        "that of 'a' is inf",
        "'d' is a DoRA adapter",
        "x: the adapters are not for one model: its shapes are [(20, 16), (20, 17)]",
    ):
        assert problem in shown


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        (lambda: [], "expected 1 to 32 adapters, got 0"),
        (
            lambda: [BlendPart("a", 1.0, {"x": linear(1)})] * (MAX_PARTS + 1),
            "expected 1 to 32 adapters, got 33",
        ),
        (lambda: [BlendPart("a", 0.0, {"x": linear(1)})], "every weight is 0"),
        (lambda: [BlendPart("a", 1.0, {"x": linear(1, rank=3000)})] * 2, "linear would have rank 6000"),
        (
            lambda: [BlendPart("a", 1e30, {"x": linear(1, scale=1e30)})],
            "x: the blended delta is not finite",
        ),
    ],
)
def test_wrong_parts(parts: Callable[[], list[BlendPart]], problem: str) -> None:
    with pytest.raises(InvalidBlendError, match=problem):
        blend(parts(), BlendOptions())


@pytest.mark.parametrize("method", ["svd", "ties", "dare_linear"])
def test_what_does_not_stay_finite_is_named(method: BlendMethod) -> None:
    density = None if method == "svd" else 0.5
    huge = linear(1, scale=1e30)
    parts = [BlendPart("a", 1e30, {"x": huge, "y": switch(1)}), BlendPart("b", 1.0, {"z": linear(2)})]
    with pytest.raises(InvalidBlendError) as caught:
        blend(parts, BlendOptions(method, density))
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["x"]
