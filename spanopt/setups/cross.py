"""Setup ``cross``: the span of the other side, which is that of K for a gradient of Q."""

from __future__ import annotations

from torch import Tensor

from spanopt.projection import project
from spanopt.setups.registry import setup

__all__ = ["cross"]


@setup("cross", needs_other=True, equal_lengths=True)
def cross(
    grad: Tensor,
    basis: Tensor,
    other: Tensor,
    *,
    ridge: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Project onto the span of the other side: for a gradient of Q, the column space of K.

    Args:
        grad: Gradient of the basis, shape ``(..., N, d)``.
        basis: Q or K, with the shape of ``grad``.
        other: K or Q, with as many tokens as ``basis``.
        ridge: Relative ridge; ``None`` for the dtype's default.
        mask: Boolean, broadcastable to ``(..., N)``, true at real tokens.

    Returns:
        The parallel part, like ``grad``.

    Example:
        >>> import torch
        >>> k = torch.tensor([[1.0], [1.0], [0.0]])
        >>> q = torch.tensor([[0.0], [0.0], [2.0]])
        >>> cross(torch.tensor([[3.0], [1.0], [5.0]]), q, k).round(decimals=4).squeeze(-1)
        tensor([2., 2., 0.])
    """
    return project(other, grad, ridge=ridge, mask=mask)
