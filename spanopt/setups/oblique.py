"""Setup ``oblique``: onto the span of Q, along the orthogonal complement of the span of K."""

from __future__ import annotations

import torch
from torch import Tensor

from spanopt.projection import orthonormal
from spanopt.setups.registry import setup

__all__ = ["oblique"]

# Called r here: the norm of the oblique part is at most 1 / (2 sqrt(r)) times the gradient's.
_OBLIQUE_RIDGE = 1 / 256


@setup("oblique", needs_other=True, equal_lengths=True)
def oblique(
    grad: Tensor,
    basis: Tensor,
    other: Tensor,
    *,
    ridge: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Project onto the span of Q along the orthogonal complement of that of K: Q (K^T Q)^+ K^T.

    The more the two spans differ, the larger is the norm of this projector. Here the norm is
    bounded. Let c be the cosine of an angle between the spans. Its direction gets the weight
    c / (c^2 + 1/256) in place of 1/c. So the norm is at most 8, and 0.4 % too small between equal
    spans.

    Args:
        grad: Gradient of the basis, shape ``(..., N, d)``.
        basis: Q or K, with the shape of ``grad``.
        other: K or Q, with as many tokens as ``basis``.
        ridge: Relative ridge of both spans; ``None`` for the dtype's default.
        mask: Boolean, broadcastable to ``(..., N)``, true at real tokens.

    Returns:
        The parallel part, like ``grad``.

    Example:
        >>> q = torch.tensor([[1.0], [0.0]])
        >>> k = torch.tensor([[1.0], [1.0]])
        >>> oblique(torch.tensor([[3.0], [1.0]]), q, k).round(decimals=1).squeeze(-1)
        tensor([4., 0.])
    """
    onto = orthonormal(basis, ridge=ridge, mask=mask)
    along = orthonormal(other, ridge=ridge, mask=mask)
    cosines = along.mT @ onto
    identity = torch.eye(cosines.shape[-1], dtype=cosines.dtype, device=cosines.device)
    factor, _ = torch.linalg.cholesky_ex(cosines.mT @ cosines + _OBLIQUE_RIDGE * identity)
    x = cosines.mT @ (along.mT @ grad.to(onto.dtype))
    return (onto @ torch.cholesky_solve(x, factor)).to(grad.dtype)
