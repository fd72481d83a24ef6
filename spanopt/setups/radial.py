"""Setup ``radial``: the direction of each token's own query (or key) vector."""

from __future__ import annotations

import torch
from torch import Tensor

from spanopt.mathematics.magnitudes import inverse_power, largest_entries
from spanopt.setups.registry import setup

__all__ = ["radial"]


@setup("radial", needs_other=False)
def radial(
    grad: Tensor,
    basis: Tensor,
    other: Tensor | None,
    *,
    ridge: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Project each token's gradient onto the direction of its own query (or key) vector.

    Args:
        grad: Gradient of the basis, shape ``(..., N, d)``.
        basis: Q or K, with the shape of ``grad``.
        other: Not used.
        ridge: Not used.
        mask: Boolean, broadcastable to ``(..., N)``, true at real tokens.

    Returns:
        The parallel part, like ``grad``.

    Example:
        >>> q = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> radial(torch.tensor([[3.0, 1.0], [5.0, 1.0]]), q, q)
        tensor([[3., 0.],
                [0., 0.]])
    """
    basis = basis.detach()
    dtype = torch.float64 if basis.dtype == torch.float64 else torch.float32
    tokens = basis.to(dtype)[..., None, :]
    tokens = (tokens * inverse_power(largest_entries(tokens))).squeeze(-2)
    size = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    direction = tokens / torch.where(size == 0, 1, size)
    if mask is not None:
        direction = direction * mask[..., None]
    along = (direction * grad.to(dtype)).sum(-1, keepdim=True)
    return (along * direction).to(grad.dtype)
