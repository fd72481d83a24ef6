"""Setup ``pooled``: the span of a head's queries (or keys) over the whole batch."""

from __future__ import annotations

from torch import Tensor

from spanopt.projection import project
from spanopt.setups.registry import setup

__all__ = ["pooled"]


@setup("pooled", needs_other=False)
def pooled(
    grad: Tensor,
    basis: Tensor,
    other: Tensor | None,
    *,
    ridge: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Project onto the span of a head's queries (or keys) over the whole batch.

    One X is fitted to all sequences of the batch. The parallel part of sequence i is Q_i X.

    Args:
        grad: Gradient of the basis, shape ``(B, ..., N, d)``.
        basis: Q or K, with the shape of ``grad``.
        other: Not used.
        ridge: Relative ridge; ``None`` for the dtype's default.
        mask: Boolean, broadcastable to ``(..., N)``, true at real tokens.

    Returns:
        The parallel part, like ``grad``.

    Example:
        >>> import torch
        >>> q = torch.ones(2, 1, 1)
        >>> pooled(torch.tensor([[[3.0]], [[1.0]]]), q, q).round(decimals=4).flatten()
        tensor([2., 2.])
    """
    if grad.ndim < 3:
        return project(basis, grad, ridge=ridge, mask=mask)

    def over_batch(x: Tensor) -> Tensor:  # (B, ..., N, d) to (..., B * N, d)
        return x.movedim(0, -3).flatten(-3, -2)

    if mask is not None:
        mask = mask.expand(grad.shape[:-1]).movedim(0, -2).flatten(-2)
    parallel = project(over_batch(basis), over_batch(grad), ridge=ridge, mask=mask)
    return parallel.unflatten(-2, (grad.shape[0], grad.shape[-2])).movedim(-3, 0)
