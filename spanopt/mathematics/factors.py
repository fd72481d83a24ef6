"""Cholesky factors, their inverses, and solving with them. On a CPU factors are made of blocks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import solve_triangular

__all__ = ["inverse_factor", "solve"]

# On a CPU LAPACK takes five times as long for a 64 x 64 matrix as for one of half its size.
_LARGEST = 32


def inverse_factor(matrix: Tensor, identity: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return T = L^{-T} for matrix = L L^T, so that T T^T is the inverse of the matrix.

    The second result is an integer for each matrix, above 0 if the matrix has no factor L.

    Args:
        matrix: Positive definite, shape (matrices, d, d).
        identity: The identity, shape (d, d), if it exists already.
    """
    if identity is None:
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, failed = _factor(matrix)
    # On a CPU, solving T L^T = I in column-major order is twice as fast as solving L T^T = I.
    return solve_triangular(factor.mT, identity.mT, upper=True, left=False), failed


def solve(matrix: Tensor, right: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverse of a matrix times ``right``, and the integers of :func:`inverse_factor`.

    Args:
        matrix: Positive definite, shape (matrices, d, d).
        right: Shape (matrices, d, m).
        identity: The identity, shape (d, d).
    """
    if matrix.device.type != "cpu":  # products take less time than solving there
        inverse, failed = inverse_factor(matrix, identity)
        return torch.bmm(inverse, torch.bmm(inverse.mT, right)), failed
    factor, failed = _factor(matrix)
    half = solve_triangular(factor.mT, right.mT, upper=True, left=False)
    return solve_triangular(factor, half, upper=False, left=False).mT, failed


def _factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return L, with any entries above its diagonal, and the integers of :func:`inverse_factor`.

    Blocks are solved for, not multiplied by inverses. Inverses would be faster, but they lose the
    factors of some matrices that are near singular.
    """
    d = matrix.shape[-1]
    if d <= _LARGEST or matrix.device.type != "cpu":
        factor, failed = torch.linalg.cholesky_ex(matrix)
        return factor, failed
    h = d // 2
    first, failed = _factor(matrix[:, :h, :h])
    below = solve_triangular(first.mT, matrix[:, :h, h:].mT, upper=True, left=False)
    rest = torch.baddbmm(matrix[:, h:, h:], below, below.mT, alpha=-1)
    last, failed_too = _factor(rest)
    factor = torch.empty_like(matrix).mT  # column-major, as LAPACK wants it
    factor[:, :h, :h], factor[:, h:, :h], factor[:, h:, h:] = first, below, last
    return factor, failed + failed_too
