"""Gram matrices, and the shift with which they have a Cholesky factor despite rounding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["add_shift", "gram_of", "least_trace", "product", "shift_for"]

# A GPU may add up the products of all tokens one after the other. The rounding errors of identical
# tokens then add up too: 2,048 of them give a Gram matrix in float32 eigenvalues down to -180 eps.
# In blocks of this many tokens they stay above -20 eps. A tensor core adds up 16 products at a
# time, so that a block of half precision may be longer.
_BLOCK, _BLOCK_OF_HALVES = 256, 2048


def shift_for(eps: float) -> float:
    """Return what is added to the diagonal of a Gram matrix, relative to its trace.

    Identical tokens are the worst case, with eigenvalues down to -20 eps. A larger shift would make
    the second Gram matrix of CholeskyQR2 singular: its least eigenvalue is the ridge over the
    shift, which for the default ridge of float32 is 24 eps too.

    Args:
        eps: The rounding unit of the products.
    """
    return 24 * eps


def least_trace(dtype: torch.dtype) -> float:
    """Return the trace that a zero basis counts as having; all others have more once scaled."""
    return float(torch.finfo(dtype).tiny ** 0.75)


def add_shift(gram: Tensor, shift: float) -> Tensor:
    """Add a shift to the diagonals of Gram matrices, in place.

    Args:
        gram: Shape (matrices, d, d).
        shift: Relative to the trace.

    Returns:
        The traces before that, shape (matrices, 1).
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    trace = diagonal.sum(-1, keepdim=True).clamp_min_(least_trace(gram.dtype))
    diagonal.add_(trace, alpha=shift)
    return trace


def gram_of(q: Tensor) -> Tensor:
    """Return Q^T Q of matrices (matrices, N, d), in float32 if Q is of half precision."""
    block = _BLOCK_OF_HALVES if q.element_size() == 2 else _BLOCK
    # BLAS on a CPU adds up in blocks of its own.
    if q.device.type == "cpu" or q.shape[1] <= block:
        return product(q.mT, q)
    return _gram_in_blocks(q, block)


def _gram_in_blocks(q: Tensor, block: int) -> Tensor:
    matrices, length, d = q.shape
    parts = -(-length // block)
    each = -(-length // parts)
    if length != parts * each:
        q = F.pad(q, (0, 0, 0, parts * each - length))
    q = q.reshape(matrices * parts, each, d)
    return product(q.mT, q).view(matrices, parts, d, d).sum(1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return products of matrices, in float32 if the matrices are of half precision."""
    if a.element_size() > 2:
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())
