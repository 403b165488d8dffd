"""The best factors of a given rank for a matrix, and what they leave out (Eckart and Young, 1936).

A product of thin factors is cut down without ever being formed; a full matrix by its singular value
decomposition, exactly where its shorter side is at most `EXACT_SIDE`, by subspace iteration
(arXiv:0909.4061, algorithm 4.4) beyond. Knows no adapters. Pure functions on NumPy arrays; any thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["EXACT_SIDE", "LowRank", "truncate_matrix", "truncate_product"]

EXACT_SIDE = 1024
"""Full decompositions cost the square of the shorter side times the longer one: beyond this, minutes."""

_OVERSAMPLING = 32
_ITERATIONS = 8


@dataclass(frozen=True, slots=True)
class LowRank:
    """`left` (n, r) times `right` (r, m), float32, in the place of a matrix M (n, m).

    `size` is ‖M‖² and `lost` is ‖M - left right‖², in Frobenius norms.
    """

    left: np.ndarray
    right: np.ndarray
    size: float
    lost: float


def truncate_product(left: np.ndarray, right: np.ndarray, rank: int) -> LowRank:
    """The best of `rank` for `left` (n, k) times `right` (k, m), of k n² and k m² operations at most.

    With left = Q₁ R₁ and rightᵀ = Q₂ R₂, the singular values are those of R₁ R₂ᵀ (k, k). Factors that are not
    finite give such factors.
    """
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return _not_finite((left.shape[0], right.shape[1]))
    q_left, r_left = np.linalg.qr(left.astype(np.float64))
    q_right, r_right = np.linalg.qr(right.T.astype(np.float64))
    u, values, v = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    tail = values[rank:]
    return _low_rank(
        q_left @ u[:, :rank], values[:rank], v[:rank] @ q_right.T, float(values @ values), float(tail @ tail)
    )


def truncate_matrix(matrix: np.ndarray, rank: int) -> LowRank:
    """The best of `rank` for `matrix` (n, m) float32; beyond `EXACT_SIDE`, close to it.

    What is lost is exact in both cases. A matrix that is not finite gives factors that are not.
    """
    if not np.isfinite(matrix).all():
        return _not_finite(matrix.shape)
    size = float(np.einsum("ij,ij->", matrix, matrix, dtype=np.float64))
    if min(matrix.shape) <= EXACT_SIDE:
        u, values, v = np.linalg.svd(matrix, full_matrices=False)
        # The tail itself: a difference of two sums would drown a small one.
        tail = values[rank:].astype(np.float64)
        return _low_rank(u[:, :rank], values[:rank], v[:rank], size, float(tail @ tail))
    basis = _leading_columns(matrix, rank)
    u, values, v = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    kept = values[:rank].astype(np.float64)
    # What was kept is an orthogonal projection, so that the squares add up.
    return _low_rank(basis @ u[:, :rank], kept, v[:rank], size, max(0.0, size - float(kept @ kept)))


def _leading_columns(matrix: np.ndarray, rank: int) -> np.ndarray:
    """An orthonormal basis (n, rank and a few more) that nearly holds the leading left singular vectors."""
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    # Any directions will do; fixed ones, so that the same matrix always gives the same factors.
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], width), dtype=np.float32)
    basis, _ = np.linalg.qr(matrix @ start)
    for _ in range(_ITERATIONS):
        other, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ other)
    return basis


def _low_rank(left: np.ndarray, values: np.ndarray, right: np.ndarray, size: float, lost: float) -> LowRank:
    """Factors of equal norms from singular vectors (columns, rows) and their values."""
    root = np.sqrt(values)
    return LowRank((left * root).astype(np.float32), (root[:, None] * right).astype(np.float32), size, lost)


def _not_finite(shape: tuple[int, int]) -> LowRank:
    left, right = (np.full(size, np.nan, np.float32) for size in ((shape[0], 1), (1, shape[1])))
    return LowRank(left, right, np.nan, np.nan)
