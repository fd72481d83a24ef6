"""Inverses of Cholesky factors, computed from blocks small enough for a fast factorisation."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse_factor"]

# On a CPU the factorisation of a 64 x 64 matrix takes seven times as long as one of half its size.
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
    largest = _LARGEST if matrix.device.type == "cpu" else matrix.shape[-1]
    return _inverse_factor(matrix, identity, largest)


def _inverse_factor(matrix: Tensor, identity: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    d = matrix.shape[-1]
    if d <= largest:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        # On a CPU, solving T L^T = I in column-major order is twice as fast as solving L T^T = I.
        identity = identity[:d, :d].mT
        return torch.linalg.solve_triangular(factor.mT, identity, upper=True, left=False), failed
    half = d // 2
    first, failed = _inverse_factor(matrix[:, :half, :half], identity, largest)
    above = torch.bmm(first.mT, matrix[:, :half, half:])
    rest = torch.baddbmm(matrix[:, half:, half:], above.mT, above, alpha=-1)
    last, failed_too = _inverse_factor(rest, identity, largest)
    inverse = torch.zeros_like(matrix)
    inverse[:, :half, :half] = first
    inverse[:, :half, half:] = torch.bmm(first, torch.bmm(above, last)).neg_()
    inverse[:, half:, half:] = last
    return inverse, failed + failed_too
