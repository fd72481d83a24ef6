"""Rescaling the gradients of Q and K in one batch, with half as many operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spanopt.mathematics import mixed
from spanopt.mathematics.checks import check_factors
from spanopt.mathematics.formulations import formulation_of
from spanopt.mathematics.precision import compute_dtype, full_precision
from spanopt.mathematics.rescaled import per_head, rescale
from spanopt.mathematics.spans import matrices, span_of

__all__ = ["rescale_together", "worthwhile"]

# The largest number of entries of Q and K. In a larger batch the time of the operations counts, not
# their number, and one batch for both sides would only need more memory.
_MOST = {"cpu": 2**18}
_MOST_ELSEWHERE = 2**26


def worthwhile(query: Tensor, key: Tensor) -> bool:
    """Return whether Q and K can be rescaled in one batch, and whether that takes less time.

    Args:
        query: Shape ``(..., H, N, d)``.
        key: Shape ``(..., H', M, d)``.
    """
    if query.shape[-2:] != key.shape[-2:] or query.dtype != key.dtype:
        return False
    most = _MOST.get(query.device.type, _MOST_ELSEWHERE)
    return query.device == key.device and 0 < query.numel() + key.numel() <= most


def rescale_together(
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    factors: Sequence[tuple[Tensor, Tensor | float]],
    *,
    ridge: float | None,
    masks: Sequence[Tensor | None],
) -> list[Tensor]:
    """Rescale several gradients as :func:`spanopt.rescale` does, with one factorisation for all.

    Args:
        grads: The gradients of the bases.
        bases: Tensors (..., H, N, d) that :func:`worthwhile` is true of. They count as constants.
        factors: Parallel and violation for each gradient: tensors of shape ``()`` or ``(H,)``. A
            violation may also be the number 0.
        ridge: The ridge as the user gave it; ``None`` for the dtype's default.
        masks: For each gradient a boolean tensor, broadcastable to (..., H, N), true at real
            tokens, or ``None`` if all are.

    Returns:
        The rescaled gradients, each with the shape and dtype of its gradient.
    """
    for grad, (a, b) in zip(grads, factors, strict=True):
        check_factors(grad, a, b)
    constants, x = [basis.detach() for basis in bases], grads[0]
    formulation = formulation_of(constants[0], x)
    if formulation == "fused":  # it has no operations to save
        return [
            rescale(grad, basis, parallel=a, violation=b, ridge=ridge, mask=mask)
            for grad, basis, (a, b), mask in zip(grads, bases, factors, masks, strict=True)
        ]
    dtype = compute_dtype(x.dtype)
    pairs = [[per_head(y, dtype, x.device) for y in pair] for pair in factors]
    factor = torch.cat(
        [
            (a - b).expand(*grad.shape[:-2], 1, 1).reshape(-1, 1, 1)
            for grad, (a, b) in zip(grads, pairs, strict=True)
        ]
    )

    def by_matrix(given: Sequence[Tensor]) -> list[Tensor]:
        if formulation == "mixed":
            return [mixed.matrices(y, mask) for y, mask in zip(given, masks, strict=True)]
        return [matrices(y, mask, dtype) for y, mask in zip(given, masks, strict=True)]

    views = by_matrix(grads)
    with full_precision(x.device.type):
        # No name keeps the joint basis, so that its memory can be used again.
        if formulation == "mixed":
            result = mixed.projected(torch.cat(by_matrix(constants)), views, ridge, factor)
        else:
            span = span_of(torch.cat(by_matrix(constants)), None, ridge, dtype)
            parts = span.whitened.split([len(view) for view in views])
            right = torch.cat([torch.bmm(a.mT, y) for a, y in zip(parts, views, strict=True)])
            result = torch.bmm(span.whitened, span.coefficients(right, factor))
    results = result.split([len(view) for view in views])
    return [
        _with_rest(own.view(grad.shape), grad, rest, violation)
        for own, grad, (_, rest), (_, violation) in zip(results, grads, pairs, factors, strict=True)
    ]


def _with_rest(own: Tensor, grad: Tensor, rest: Tensor, violation: Tensor | float) -> Tensor:
    if isinstance(violation, Tensor) or violation != 0:
        # In place this needs less memory, but it has no derivative in a part of a tensor.
        own = own.addcmul(grad, rest) if torch.is_grad_enabled() else own.addcmul_(grad, rest)
    return own.to(grad.dtype)
