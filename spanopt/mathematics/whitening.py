"""Rescaling with a whitened basis. On a CPU a batch is cut into pieces that fit its cache."""

from __future__ import annotations

import torch
from torch import Tensor

from spanopt.mathematics.pieces import cuts, stacks
from spanopt.mathematics.precision import compute_dtype, full_precision
from spanopt.mathematics.spans import Total, matrices, span_of

__all__ = ["combined", "orthonormal_basis"]


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
        return torch.zeros_like(x) if rest is None else (x.to(dtype) * rest).to(x.dtype)
    with full_precision(basis.device.type):
        # Accelerators are faster with a whole batch, and torch.compile would repeat the code for
        # each piece.
        if total is not None or basis.device.type != "cpu" or torch.compiler.is_compiling():
            real = matrices(x, mask, dtype)
            result = _projected(basis, [real], x.shape, ridge, mask, factor, dtype, total)
            if rest is not None:
                result.addcmul_(real.view(x.shape) if mask is None else x.to(dtype), rest)
            return result.to(x.dtype)
        mask = None if mask is None else mask.expand(basis.shape[:-1])
        factor, rest = (
            y if y is None or y.ndim == 0 else y.expand(*basis.shape[:-2], 1, 1)
            for y in (factor, rest)
        )
        result = torch.empty_like(x)
        for cut in cuts(basis.shape):
            m, f, r = (y if y is None or y.ndim == 0 else y[cut] for y in (mask, factor, rest))
            _piece(result[cut], basis[cut], x[cut], ridge, m, f, r, dtype)
        return result


def orthonormal_basis(basis: Tensor, *, ridge: float | None, mask: Tensor | None) -> Tensor:
    """Return U with U U^T = P. It is shaped like the basis and has the dtype computed in."""
    dtype = compute_dtype(basis.dtype)
    if basis.numel() == 0:
        return torch.zeros_like(basis, dtype=dtype)
    with full_precision(basis.device.type):
        return span_of(basis, mask, ridge, dtype).orthonormal().view(basis.shape)


def _piece(
    out: Tensor,
    basis: Tensor,
    x: Tensor,
    ridge: float | None,
    mask: Tensor | None,
    factor: Tensor | None,
    rest: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Write ``factor * P x + rest * x`` into ``out``. If views of x suffice, x is not copied."""
    views = stacks(x) if mask is None and x.dtype == dtype else []
    views = views or [matrices(x, mask, dtype)]
    result = _projected(basis, views, x.shape, ridge, mask, factor, dtype)
    if rest is None:
        out.copy_(result)
    elif x.dtype == dtype and not torch.is_grad_enabled():
        torch.addcmul(result, x, rest, out=out)
    else:
        out.copy_(result.addcmul_(x.to(dtype), rest))


def _projected(
    basis: Tensor,
    views: list[Tensor],
    shape: torch.Size,
    ridge: float | None,
    mask: Tensor | None,
    factor: Tensor | None,
    dtype: torch.dtype,
    total: Total | None = None,
) -> Tensor:
    """Return ``factor * P x`` in the given shape of x. x is given as views (matrices, N, m)."""
    span = span_of(basis, mask, ridge, dtype, total)
    right = _products(span.whitened, views)
    right = right if total is None else total(right)
    # Multiplying the smallest matrix by the factor saves passes over the larger ones.
    return torch.bmm(span.whitened, span.coefficients(right, factor)).view(shape)


def _products(whitened: Tensor, views: list[Tensor]) -> Tensor:
    """Return A^T x, shape (matrices, d, m)."""
    if len(views) == 1:
        return torch.bmm(whitened.mT, views[0])
    parts = whitened.split(len(views[0]))
    if torch.is_grad_enabled():  # writing into existing tensors has no derivative
        return torch.cat([torch.bmm(a.mT, x) for a, x in zip(parts, views, strict=True)])
    right = whitened.new_empty(len(whitened), whitened.shape[-1], views[0].shape[-1])
    for a, x, out in zip(parts, views, right.split(len(views[0])), strict=True):
        torch.bmm(a.mT, x, out=out)
    return right
