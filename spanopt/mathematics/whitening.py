"""CholeskyQR2: the projection by matrix products and d x d factorisations alone.

The Gram matrix Q^T Q squares the condition number of Q, so one Cholesky factorisation of it would
lose half the digits. The functions here whiten the basis with a first, shifted factorisation and
solve with the Gram matrix of the whitened basis (CholeskyQR2: Yamamoto et al., 2015; the shift:
Fukaya et al., 2020), all matrix products and d x d factorisations: 10 N d^2 floating-point
operations, no iteration, no branch on a value, no host synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from spanopt.mathematics.magnitudes import inverse_power, largest_entries
from spanopt.mathematics.precision import (
    compute_dtype,
    default_ridge,
    full_precision,
    matmul_eps,
)

__all__ = ["Total", "combined", "orthonormal_basis"]

Total: TypeAlias = Callable[..., Tensor]
"""``total(part, operation="sum")``: over processes, the sum of their parts, or the ``"max"``."""


def combined(
    basis: Tensor,
    x: Tensor,
    *,
    ridge: float | None,
    mask: Tensor | None,
    factor: Tensor | None = None,
    rest: Tensor | None = None,
    total: Total | None = None,
) -> Tensor:
    """Return ``factor * P x + rest * x``: see :func:`spanopt.mathematics.formulations.combined`."""
    dtype = compute_dtype(torch.promote_types(basis.dtype, x.dtype))
    # A process without tokens still takes part in the sums.
    if total is None and (basis.numel() == 0 or x.numel() == 0):
        result = torch.zeros_like(x, dtype=dtype)
        return (result if rest is None else result.addcmul_(x.to(dtype), rest)).to(x.dtype)
    ridge = max(default_ridge(dtype), ridge or 0.0)
    with full_precision(basis.device.type):
        # Copies have no name: each is gone, for the next buffer to take its place, once it is used.
        whitened, inverse, weight = _factored(_scaled(basis, mask, dtype, total), ridge, total)
        if factor is not None:
            by_head = weight.reshape(*basis.shape[:-2], 1, 1) * factor
            weight = by_head.reshape(weight.shape)
        # The weight goes on the smallest matrix, which saves passes over the others.
        inner = _total(whitened.mT @ _matrices(x, mask, dtype), total)
        coefficients = inverse @ ((inverse * weight).mT @ inner)
        result = (whitened @ coefficients).reshape(x.shape)
    if rest is not None:
        result.addcmul_(x.to(dtype), rest)
    return result.to(x.dtype)


def orthonormal_basis(basis: Tensor, *, ridge: float | None, mask: Tensor | None) -> Tensor:
    """Return U with U U^T = P, shaped like the basis, in the dtype that is computed in."""
    dtype = compute_dtype(basis.dtype)
    if basis.numel() == 0:
        return torch.zeros_like(basis, dtype=dtype)
    ridge = max(default_ridge(dtype), ridge or 0.0)
    with full_precision(basis.device.type):
        whitened, inverse, valid = _factored(_scaled(basis, mask, dtype, None), ridge, None)
        return (whitened @ (inverse * valid)).reshape(basis.shape)


def _matrices(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x as (matrices, N, d), with zeros for masked tokens; it may be a view of x."""
    shape = x.shape[:-2].numel(), *x.shape[-2:]
    if mask is None:  # a copy, if it takes one, saves one in each product
        return x.to(dtype).reshape(shape)
    x = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return x.masked_fill_(~mask[..., None], 0).view(shape)


def _scaled(basis: Tensor, mask: Tensor | None, dtype: torch.dtype, total: Total | None) -> Tensor:
    """Return a copy of the basis as (matrices, N, d), each times a power of two.

    The largest entry of each matrix is then about 1, which changes no span and, but for entries
    below the smallest normal number, no digit.
    """
    q = basis.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    q = q.view(basis.shape[:-2].numel(), *basis.shape[-2:])
    if mask is not None:
        q = q.view(basis.shape).masked_fill_(~mask[..., None], 0).view(q.shape)
    largest = largest_entries(q)
    if total is not None:  # every process has to scale its tokens alike
        largest = total(largest, "max")
    return q.mul_(inverse_power(largest))


def _factored(q: Tensor, ridge: float, total: Total | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return A and T with P = A T (A T)^T, and for each matrix 1, or NaN if there are none."""
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    identity = identity.expand(q.shape[0], -1, -1).contiguous()
    whitened, gram, failed = _whiten(q, ridge, identity, total)
    inverse, failed_again = _inverse_factor(gram, identity)
    valid = torch.ones_like(failed, dtype=q.dtype).masked_fill(failed + failed_again > 0, torch.nan)
    return whitened, inverse, valid[:, None, None]


def _whiten(
    q: Tensor, ridge: float, identity: Tensor, total: Total | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return A = Q T with near-orthonormal columns, A^T A + rho T^T T, and where it failed.

    T is the inverse of a Cholesky factor of the shifted Gram matrix. Whatever T is,
    A (A^T A + rho T^T T)^{-1} A^T = Q (Q^T Q + rho I)^{-1} Q^T, so the shift costs no accuracy.
    """
    gram = _total(q.mT @ q, total)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    trace = diagonal.sum(-1, keepdim=True)
    trace = trace.masked_fill(trace == 0, 1)  # any scale will do for a zero basis
    # Large enough against the rounding errors of the Gram matrix for the factor to exist.
    shift = max(8 * matmul_eps(gram.dtype), ridge)
    diagonal.add_(trace, alpha=shift)
    inverse, failed = _inverse_factor(gram, identity)
    whitened = q @ inverse
    ridged = (inverse * (ridge * trace)[..., None]).mT
    gram = torch.baddbmm(_total(whitened.mT @ whitened, total), ridged, inverse)
    return whitened, gram, failed


def _total(part: Tensor, total: Total | None) -> Tensor:
    return part if total is None else total(part)


def _inverse_factor(matrix: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
    """Return T = L^{-T}, so that T T^T inverts matrix = L L^T, and above 0 where there is none."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    # Solving T L^T = I, both in column-major order, is twice as fast as L T^T = I on a CPU.
    return torch.linalg.solve_triangular(factor.mT, identity.mT, upper=True, left=False), failed
