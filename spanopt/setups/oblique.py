"""Setup ``oblique``: the span of Q along the complement of that of K."""

from __future__ import annotations

import torch
from torch import Tensor

from spanopt.projection import orthonormal
from spanopt.setups.registry import setup

__all__ = ["oblique"]

# At most 1 / (2 sqrt(c)) times the norm of a gradient is in its oblique part.
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
    """Project onto the span of Q along the complement of that of K: Q (K^T Q)^+ K^T.

    Its norm is the larger the more the two spans differ; here it is bounded. In terms of the
    cosines c of the angles between the spans a direction gets the weight c / (c^2 + 1/256) in place
    of 1/c, so that the norm is at most 8 and, between equal spans, 0.4 % too small.

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
