"""Setup ``feature``: the leading feature directions of the other side."""

from __future__ import annotations

import torch
from torch import Tensor

from spanopt.mathematics.magnitudes import inverse_power, largest_entries
from spanopt.setups.registry import setup

__all__ = ["feature"]

_ENERGY = 0.9


@setup("feature", needs_other=True)
def feature(
    grad: Tensor,
    basis: Tensor,
    other: Tensor,
    *,
    ridge: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Project each token's gradient onto the leading feature directions of the other side.

    For a gradient of Q these are the leading right singular vectors of K. As many are taken as
    carry 90 % of the squared norm of K.

    Args:
        grad: Gradient of the basis, shape ``(..., N, d)``.
        basis: Not used.
        other: K or Q, shape ``(..., M, d)``.
        ridge: Not used.
        mask: Boolean, broadcastable to ``(..., N)``, true at the basis's real tokens. All tokens
            of the other side count.

    Returns:
        The parallel part, like ``grad``.

    Example:
        >>> k = torch.tensor([[3.0, 0.0], [3.0, 0.1]])
        >>> feature(torch.tensor([[3.0, 1.0]]), k[:1], k).round(decimals=1) + 0.0
        tensor([[3.0000, 0.1000]])
    """
    other = other.detach()
    dtype = torch.float64 if other.dtype == torch.float64 else torch.float32
    k = other.to(dtype)
    k = k * inverse_power(largest_entries(k))
    energy, directions = torch.linalg.eigh(k.mT @ k)  # in ascending order
    energy = energy.clamp(min=0)
    below = energy.cumsum(-1)
    leading = below > (1 - _ENERGY) * below[..., -1:]
    directions = directions * leading[..., None, :]
    parallel = (grad.to(dtype) @ directions) @ directions.mT
    if mask is not None:
        parallel = parallel * mask[..., None]
    return parallel.to(grad.dtype)
