"""Setup ``span``, the default: the column space of Q (or K) itself."""

from __future__ import annotations

from torch import Tensor

from spanopt.projection import project
from spanopt.setups.registry import setup

__all__ = ["span"]


@setup("span", needs_other=False)
def span(
    grad: Tensor,
    basis: Tensor,
    other: Tensor | None,
    *,
    ridge: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Project onto the column space of Q (or K) itself. This is the default.

    Args:
        grad: Gradient of the basis, shape ``(..., N, d)``.
        basis: Q or K, with the shape of ``grad``.
        other: Not used.
        ridge: Relative ridge; ``None`` for the dtype's default.
        mask: Boolean, broadcastable to ``(..., N)``, true at real tokens.

    Returns:
        The parallel part, like ``grad``.

    Example:
        >>> import torch
        >>> q = torch.tensor([[1.0], [1.0], [0.0]])
        >>> span(torch.tensor([[3.0], [1.0], [5.0]]), q, q).round(decimals=4).squeeze(-1)
        tensor([2., 2., 0.])
    """
    return project(basis, grad, ridge=ridge, mask=mask)
