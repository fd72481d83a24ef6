"""CholeskyQR2 with products of half precision: operands of 16 bits, sums in float32.

If Q and its gradient are bfloat16 or float16, the products over tokens read them as they are. No
float32 copy is made, and tensor cores can be used. Matrices of d x d are kept in float32. They
enter a product as two terms of half precision, so they lose no digit that the result has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spanopt.mathematics import whitening
from spanopt.mathematics.factors import inverse_factor
from spanopt.mathematics.gram import add_shift, gram_of, product, shift_for
from spanopt.mathematics.magnitudes import inverse_power, largest_entries
from spanopt.mathematics.precision import default_ridge, full_precision
from spanopt.mathematics.spans import Total

__all__ = ["combined", "matrices", "projected", "why_not"]

_SHIFT = shift_for(torch.finfo(torch.float32).eps)


def why_not(basis: Tensor, x: Tensor, total: Total | None) -> str:
    """Return why this formulation cannot be used for the tensors; an empty text if it can."""
    if basis.dtype not in (torch.bfloat16, torch.float16) or x.dtype != basis.dtype:
        found = f"{basis.dtype} and {x.dtype}"
        return f"it takes Q and its gradient both in bfloat16 or both in float16, not in {found}"
    if total is not None:
        return "it takes no sequences whose tokens are spread over processes"
    if torch.is_grad_enabled() and x.requires_grad:
        return "it has no second derivative"
    return ""


def combined(
    basis: Tensor,
    x: Tensor,
    *,
    ridge: float | None,
    mask: Tensor | None,
    factor: Tensor | None = None,
    rest: Tensor | None = None,
) -> Tensor:
    """Return ``factor * P x + rest * x``: see :func:`spanopt.mathematics.formulations.combined`.

    The error is that of two roundings to the dtype of Q. One of them is the rounding of the result.
    """
    if basis.numel() == 0 or x.numel() == 0:
        return whitening.combined(basis, x, ridge=ridge, mask=mask, factor=factor, rest=rest)
    with full_precision(basis.device.type):
        q = matrices(basis.detach(), mask)
        if factor is not None:
            factor = factor.expand(*basis.shape[:-2], 1, 1).reshape(-1, 1, 1)
        result = projected(q, [matrices(x, mask)], ridge, factor).view(x.shape)
    if rest is not None:
        result.addcmul_(x, rest)
    return result.to(x.dtype)


def projected(
    q: Tensor, views: Sequence[Tensor], ridge: float | None, factor: Tensor | None
) -> Tensor:
    """Return ``factor * P x`` in float32.

    Args:
        q: Q with zeros at masked tokens, shape (matrices, N, d).
        views: x with zeros at masked tokens, in parts (matrices, N, d) that follow each other.
        ridge: The ridge as the user gave it.
        factor: Shape (matrices, 1, 1), or ``None`` for 1.
    """
    ridge = max(default_ridge(torch.float32), ridge or 0.0)
    q = _scaled(q)
    gram = gram_of(q)
    trace = add_shift(gram, max(_SHIFT, ridge))
    identity = torch.eye(q.shape[-1], dtype=gram.dtype, device=q.device)
    inverse, failed = inverse_factor(gram, identity)
    whitened = _times(q, inverse).to(q.dtype)
    ridged = (inverse * (ridge * trace).unsqueeze(-1)).mT
    second = torch.baddbmm(gram_of(whitened), ridged, inverse)
    inverse, failed_again = inverse_factor(second, identity)
    missing = (failed + failed_again > 0).view(-1, 1, 1)
    weight = torch.where(missing, torch.nan, 1.0 if factor is None else factor)
    parts = whitened.split([len(x) for x in views])
    inner = torch.cat([product(a.mT, x) for a, x in zip(parts, views, strict=True)])
    return _times(whitened, inverse @ (inverse.mT @ (inner * weight)))


def matrices(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x as (matrices, N, d), with zeros at masked tokens. It may be a view of x."""
    if mask is not None:
        x = x.masked_fill(mask.logical_not().unsqueeze(-1), 0)
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:])


def _scaled(q: Tensor) -> Tensor:
    """Return each matrix times a power of two, so that float32 can add up squares of its entries.

    float16 needs no scaling, since float32 can always add up its squares.
    """
    if q.dtype == torch.float16:
        return q
    return q * inverse_power(largest_entries(q).float()).to(q.dtype)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Return in float32 the products of matrices of half precision with float32 matrices."""
    scale = None
    if a.dtype == torch.float16:  # float16 has a small range
        scale = inverse_power(largest_entries(b))
        b = b * scale
    high = b.to(a.dtype)
    low = (b - high).to(a.dtype)
    result = product(a, high).add_(product(a, low))
    return result if scale is None else result.div_(scale)
