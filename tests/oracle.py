"""The span decomposition in plain NumPy float64: slow, and plainly equal to the formulas.

Everything that the library computes without forming an N x N matrix is formed here explicitly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class FourWay(NamedTuple):
    """The exact four-way decomposition of a score gradient G (N x M)."""

    order_0: Array
    """P_Q G P_K: the bidirectional parallel span."""
    query_violation: Array
    """(I - P_Q) G P_K: order 1, a violation on the query side alone."""
    key_violation: Array
    """P_Q G (I - P_K): order 1, a violation on the key side alone."""
    order_2: Array
    """(I - P_Q) G (I - P_K): a violation on both sides."""


def projector(Q: ArrayLike, rcond: float = 1e-12) -> Array:
    """Return the N x N orthogonal projector onto the column space of Q (N x d).

    Singular values up to ``rcond`` times the Frobenius norm of Q do not count to its rank.
    """
    Q = np.asarray(Q, dtype=np.float64)
    left, sigma, _ = np.linalg.svd(Q, full_matrices=False)
    span = left[:, sigma > rcond * np.linalg.norm(Q)]
    return span @ span.T


def tikhonov(Q: ArrayLike, ridge: float) -> Array:
    """Return Q (Q^T Q + rho I)^{-1} Q^T, rho = ridge * ||Q||_F^2, by its weights on the span.

    The weight of a left singular direction is sigma^2 / (sigma^2 + rho).
    """
    Q = np.asarray(Q, dtype=np.float64)
    left, sigma, _ = np.linalg.svd(Q, full_matrices=False)
    rho = ridge * np.sum(Q**2)
    weight = np.divide(sigma**2, sigma**2 + rho, out=np.zeros_like(sigma), where=sigma > 0)
    return left @ np.diag(weight) @ left.T


def four_way(G: ArrayLike, Q: ArrayLike, K: ArrayLike) -> FourWay:
    """Decompose the score gradient G (N x M) by the spans of Q (N x d) and K (M x d)."""
    G = np.asarray(G, dtype=np.float64)
    P_Q, P_K = projector(Q), projector(K)
    V_Q, V_K = np.eye(len(P_Q)) - P_Q, np.eye(len(P_K)) - P_K
    return FourWay(P_Q @ G @ P_K, V_Q @ G @ P_K, P_Q @ G @ V_K, V_Q @ G @ V_K)


def rescaled(
    g: ArrayLike,
    Q: ArrayLike,
    parallel: ArrayLike,
    violation: ArrayLike,
    mask: ArrayLike | None = None,
    rcond: float = 1e-12,
) -> Array:
    """Return parallel * P g + violation * (g - P g) for each matrix of g (..., N, d).

    The scales are numbers, or have one value per head: shape (H,) for g of shape (..., H, N, d).
    With a mask (broadcast to (..., N), true at real tokens) P is the projector of the real tokens
    alone, and the parallel part of the others is zero.
    """
    g = np.asarray(g, dtype=np.float64)
    Q = np.asarray(Q, dtype=np.float64)
    leading = g.shape[:-2]
    a, b = np.broadcast_to(parallel, leading), np.broadcast_to(violation, leading)
    real = np.broadcast_to(True if mask is None else mask, g.shape[:-1])
    result = np.empty_like(g)
    for head in np.ndindex(leading):
        tokens = real[head]
        inside = np.zeros_like(g[head])
        inside[tokens] = projector(Q[head][tokens], rcond) @ g[head][tokens]
        result[head] = a[head] * inside + b[head] * (g[head] - inside)
    return result
