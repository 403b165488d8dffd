"""The best factors of a given rank for a matrix, and what they leave out (Eckart and Young, 1936).

A product of thin factors is cut down without ever being formed; a full matrix by its leading singular
vectors, which are exact where its shorter side is at most `EXACT_SIDE` and found by subspace iteration
(arXiv:0909.4061, algorithm 4.4) beyond. Knows no adapters. Pure functions on NumPy arrays; any thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["EXACT_SIDE", "LowRank", "truncate_matrix", "truncate_product"]

EXACT_SIDE = 1024
"""What is exact costs the square of the shorter side times the longer one: a second for 1024 and 4096."""

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
    root, tail = np.sqrt(values[:rank]), values[rank:]
    return LowRank(
        (q_left @ u[:, :rank] * root).astype(np.float32),
        (root[:, None] * (v[:rank] @ q_right.T)).astype(np.float32),
        float(values @ values),
        float(tail @ tail),
    )


def truncate_matrix(matrix: np.ndarray, rank: int) -> LowRank:
    """The best of `rank` for `matrix` (n, m), float32; beyond `EXACT_SIDE`, close to it.

    What is lost is exact in both cases. A matrix that is not finite gives factors that are not.
    """
    if not np.isfinite(matrix).all():
        return _not_finite(matrix.shape)
    if matrix.shape[0] > matrix.shape[1]:
        found = truncate_matrix(matrix.T, rank)
        return LowRank(found.right.T, found.left.T, found.size, found.lost)
    if len(matrix) <= EXACT_SIDE:
        wide = matrix.astype(np.float64)
        # Eigenvectors of M Mᵀ, several times as fast as M's own decomposition; float64 pays for the square.
        squares, vectors = np.linalg.eigh(wide @ wide.T)
        kept = vectors[:, ::-1][:, :rank]
        lost = float(squares[: max(0, len(squares) - rank)].clip(0).sum())
        return _projected(wide, kept, float(np.sum(wide * wide)), lost)
    size = float(np.einsum("ij,ij->", matrix, matrix, dtype=np.float64))
    basis = _leading_columns(matrix, rank)
    vectors, values, _ = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    kept = values[:rank].astype(np.float64)
    # What is kept is an orthogonal projection, so that the squares add up.
    return _projected(matrix, basis @ vectors[:, :rank], size, max(0.0, size - float(kept @ kept)))


def _projected(matrix: np.ndarray, vectors: np.ndarray, size: float, lost: float) -> LowRank:
    """`matrix` (n, m) projected onto orthonormal `vectors` (n, r), as factors of equal norms."""
    rows = vectors.T @ matrix
    root = np.sqrt(np.linalg.norm(rows, axis=1))
    inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    return LowRank(
        (vectors * root).astype(np.float32), (inverse[:, None] * rows).astype(np.float32), size, lost
    )


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


def _not_finite(shape: tuple[int, int]) -> LowRank:
    left, right = (np.full(size, np.nan, np.float32) for size in ((shape[0], 1), (1, shape[1])))
    return LowRank(left, right, np.nan, np.nan)
