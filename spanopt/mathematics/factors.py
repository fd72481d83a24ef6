"""Inverses of Cholesky factors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse_factor"]


def inverse_factor(matrix: Tensor, identity: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return T = L^{-T} for matrix = L L^T, so that T T^T is the inverse of the matrix.

    The second result is an integer for each matrix, above 0 if the matrix has no factor L. The
    factorisation is LAPACK's of the whole matrix. Blocks that multiply by inverses of smaller
    factors are faster on a CPU, but fail for some bases of low rank.

    Args:
        matrix: Positive definite, shape (matrices, d, d).
        identity: The identity, shape (d, d), if it exists already.
    """
    if identity is None:
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    # On a CPU, solving T L^T = I in column-major order is twice as fast as solving L T^T = I.
    inverse = torch.linalg.solve_triangular(factor.mT, identity.mT, upper=True, left=False)
    return inverse, failed
