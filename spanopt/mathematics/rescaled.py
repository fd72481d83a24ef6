"""Rescaling a gradient: its parallel part and its violation are scaled and added up again."""

from __future__ import annotations

import torch
from torch import Tensor

from spanopt.mathematics.checks import check_factors, check_tensors
from spanopt.mathematics.formulations import combined
from spanopt.mathematics.precision import compute_dtype
from spanopt.mathematics.spans import Total

__all__ = ["rescale", "rescale_by_document"]


def rescale(
    grad: Tensor,
    basis: Tensor,
    *,
    parallel: float | Tensor,
    violation: float | Tensor,
    ridge: float | None = None,
    mask: Tensor | None = None,
    total: Total | None = None,
) -> Tensor:
    """Scale the parallel part and the violation of a gradient and add them up again.

    Computes ``parallel * P g + violation * (g - P g)``. This is linear in ``grad``, so it commutes
    with loss scaling and gradient accumulation. Two equal numbers need no projection: the result
    is then ``parallel * grad``, and ``grad`` itself if both are 1. If ``violation`` is the number
    0, only the projection is computed.

    Args:
        grad: Gradient of the basis, shape ``(..., N, d)``.
        basis: Q or K, shape ``(..., N, d)``.
        parallel: Factor of the parallel part: a number, or a tensor of shape ``()`` or ``(H,)``.
            The latter has one value per head of a gradient ``(..., H, N, d)``.
        violation: Factor of the violation: a number or a tensor of shape ``()`` or ``(H,)``.
        ridge: Relative ridge: singular values of ``basis`` below about its square root times the
            norm are dropped. ``None`` is :func:`default_ridge` of the dtype computed in.
        mask: Boolean, shape ``(..., N)``, true at real tokens; ``None`` if all are. The span is
            that of the real tokens. The gradient of the others is multiplied by ``violation``.
        total: Given where the tokens of a sequence are spread over processes. Each process makes
            this call with its own tokens. ``total(part)`` returns the sum of a tensor over the
            processes, and ``total(part, "max")`` the elementwise maximum.

    Returns:
        The rescaled gradient, with the shape and dtype of ``grad``.

    Raises:
        TypeError: A dtype is not real floating point, or the mask is not boolean.
        ValueError: Shapes do not fit, the ridge is negative or not finite, or the shape of a factor
            is neither ``()`` nor ``(H,)``.

    Source: g' = b g + (a - b) P g; see ``docs/method.md``.

    Example:
        >>> import torch
        >>> q = torch.tensor([[1.0], [1.0], [0.0]])
        >>> g = torch.tensor([[3.0], [1.0], [5.0]])
        >>> rescale(g, q, parallel=2.0, violation=1.0).round(decimals=4).squeeze(-1)
        tensor([5., 3., 5.])
    """
    check_tensors(basis, grad, ridge, mask)
    check_factors(grad, parallel, violation)
    numbers = not isinstance(parallel, Tensor) and not isinstance(violation, Tensor)
    if numbers and parallel == violation:
        return grad if parallel == 1 else grad * parallel
    dtype = compute_dtype(torch.promote_types(basis.dtype, grad.dtype))
    a, b = (per_head(factor, dtype, grad.device) for factor in (parallel, violation))
    rest = b if isinstance(violation, Tensor) or violation != 0 else None
    return combined(basis, grad, ridge=ridge, mask=mask, factor=a - b, rest=rest, total=total)


def rescale_by_document(
    grad: Tensor,
    basis: Tensor,
    index: Tensor,
    *,
    parallel: float | Tensor,
    violation: float | Tensor,
    ridge: float | None = None,
) -> Tensor:
    """Rescale a gradient if sequences hold several documents, each with a span of its own.

    Args:
        grad: Gradient of the basis, shape ``(B, ..., N, d)``.
        basis: Q or K, shape ``(B, ..., N, d)``.
        index: Integers, shape ``(T, L)``. A row has the positions of one document's tokens among
            the ``B * N`` tokens of the batch, filled up with the number ``B * N``.
        parallel: Factor of the parallel part: a number, or a tensor of shape ``()`` or ``(H,)``.
        violation: Factor of the violation: a number or a tensor of shape ``()`` or ``(H,)``. The
            gradient of tokens in no document is multiplied by it.
        ridge: Relative ridge: singular values of ``basis`` below about its square root times the
            norm are dropped. ``None`` is :func:`default_ridge` of the dtype computed in.

    Returns:
        The rescaled gradient, with the shape and dtype of ``grad``.

    Raises:
        TypeError: A dtype is not real floating point.
        ValueError: Shapes do not fit, the ridge is negative or not finite, or the shape of a factor
            is neither ``()`` nor ``(H,)``.

    Example:
        >>> import torch
        >>> q, g = torch.ones(1, 4, 1), torch.tensor([[[1.0], [3.0], [5.0], [6.0]]])
        >>> documents = torch.tensor([[0, 1], [2, 4]])  # of 2 and of 1 tokens, then padding
        >>> rescale_by_document(g, q, documents, parallel=2.0, violation=1.0).round().flatten()
        tensor([ 3.,  5., 10.,  6.])
    """
    check_tensors(basis, grad, ridge, None)
    check_factors(grad, parallel, violation)
    batch, length = grad.shape[0], grad.shape[-2]

    def by_token(x: Tensor) -> Tensor:  # (B * N + 1, ..., d); fill positions go to the last row
        rows = x.movedim(-2, 1).flatten(0, 1)
        return torch.cat([rows, torch.zeros_like(rows[:1])])

    real = index < batch * length
    scaled = rescale(
        by_token(grad)[index].movedim(1, -2),
        by_token(basis.detach())[index].movedim(1, -2),
        parallel=parallel,
        violation=violation,
        ridge=ridge,
        mask=real.reshape(len(index), *(1,) * (grad.ndim - 3), index.shape[1]),
    )
    b = per_head(violation, compute_dtype(grad.dtype), grad.device)
    tokens = by_token((grad * b).to(grad.dtype))
    tokens = tokens.index_copy(0, index.flatten(), scaled.movedim(-2, 1).flatten(0, 1))
    return tokens[:-1].unflatten(0, (batch, length)).movedim(1, -2)


def per_head(factor: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a factor as a tensor of shape ``()`` or ``(H, 1, 1)``."""
    if not isinstance(factor, Tensor):  # a tensor made of a number would be copied to the device
        return torch.full((), factor, dtype=dtype, device=device)
    factor = factor.to(device, dtype)
    return factor[..., None, None] if factor.ndim else factor
