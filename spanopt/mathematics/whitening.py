"""A whitened basis in use: rescaling by matrix products, on a CPU in pieces that fit its cache."""

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
        # Accelerators want a batch whole, and torch.compile would repeat its code for each piece.
        if total is not None or basis.device.type != "cpu" or torch.compiler.is_compiling():
            return _whole(basis, x, ridge, mask, factor, rest, dtype, total)
        leading = basis.shape[:-2]
        pieces = cuts(basis.shape)
        if len(pieces) == 1 and (x.dtype != dtype or len(stacks(x)) < 2):
            return _whole(basis, x, ridge, mask, factor, rest, dtype)
        mask = None if mask is None else mask.expand(basis.shape[:-1])
        factor, rest = (
            y if y is None or y.ndim == 0 else y.expand(*leading, 1, 1) for y in (factor, rest)
        )
        result = torch.empty_like(x)
        for cut in pieces:
            m, f, r = (y if y is None or y.ndim == 0 else y[cut] for y in (mask, factor, rest))
            _piece(result[cut], basis[cut], x[cut], ridge, m, f, r, dtype)
        return result


def orthonormal_basis(basis: Tensor, *, ridge: float | None, mask: Tensor | None) -> Tensor:
    """Return U with U U^T = P, shaped like the basis, in the dtype that is computed in."""
    dtype = compute_dtype(basis.dtype)
    if basis.numel() == 0:
        return torch.zeros_like(basis, dtype=dtype)
    with full_precision(basis.device.type):
        return span_of(basis, mask, ridge, dtype).orthonormal().view(basis.shape)


def _whole(
    basis: Tensor,
    x: Tensor,
    ridge: float | None,
    mask: Tensor | None,
    factor: Tensor | None,
    rest: Tensor | None,
    dtype: torch.dtype,
    total: Total | None = None,
) -> Tensor:
    """Return ``factor * P x + rest * x``, all matrices at once."""
    span = span_of(basis, mask, ridge, dtype, total)
    real = matrices(x, mask, dtype)
    right = torch.bmm(span.whitened.mT, real)
    right = right if total is None else total(right)
    result = torch.bmm(span.whitened, span.coefficients(right, factor)).view(x.shape)
    if rest is not None:
        result.addcmul_(real.view(x.shape) if mask is None else x.to(dtype), rest)
    return result.to(x.dtype)


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
    """Write ``factor * P x + rest * x`` into ``out``, without copies of x where views will do."""
    if x.dtype != dtype or not stacks(out):
        out.copy_(_whole(basis, x, ridge, mask, factor, rest, dtype))
        return
    span = span_of(basis, mask, ridge, dtype)
    views = stacks(x) if mask is None else []
    views = views or [matrices(x, mask, dtype)]
    parts = span.whitened.split(len(views[0]))
    right = [torch.bmm(part.mT, view) for part, view in zip(parts, views, strict=True)]
    solution = span.coefficients(right[0] if len(right) == 1 else torch.cat(right), factor)
    if rest is not None and torch.is_grad_enabled():
        out.copy_(x).mul_(rest)
    elif rest is not None:
        torch.mul(x, rest, out=out)
    targets = stacks(out)  # after the lines above, for autograd to see them
    many = len(targets[0])
    pairs = zip(targets, span.whitened.split(many), solution.split(many), strict=True)
    for target, part, weights in pairs:
        target.baddbmm_(part, weights, beta=0 if rest is None else 1)
