"""Projection setups: what counts as the parallel part of a gradient.

A setup is a function ``(grad, basis, other, *, ridge=None, mask=None)`` that returns the parallel
part P g of the gradient g of ``basis``, linear in g, where ``other`` is K for a gradient of Q and Q
for one of K. What it leaves, g - P g, is the violation.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from spanopt.projection import inverse_power, largest_entries, orthonormal, project

__all__ = [
    "NEED_OTHER",
    "SETUPS",
    "Setup",
    "cross",
    "feature",
    "oblique",
    "pooled",
    "radial",
    "setup_name",
    "span",
]

# At most 1 / (2 sqrt(c)) times the norm of a gradient is in its oblique part.
_OBLIQUE_RIDGE = 1 / 256
_ENERGY = 0.9


class Setup(Protocol):
    """A projection setup."""

    def __call__(
        self,
        grad: Tensor,
        basis: Tensor,
        other: Tensor,
        *,
        ridge: float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the parallel part of a gradient.

        Args:
            grad: Shape ``(..., N, d)``.
            basis: What it is the gradient of, Q or K, likewise.
            other: K or Q, shape ``(..., M, d)``.
            ridge: As in :func:`spanopt.project`.
            mask: As in :func:`spanopt.project`, of the tokens of ``basis``.
        """
        ...


def span(
    grad: Tensor,
    basis: Tensor,
    other: Tensor,
    *,
    ridge: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Project onto the column space of Q (or K) itself: the default.

    Args:
        grad: As in :class:`Setup`.
        basis: Likewise.
        other: Not used.
        ridge: Likewise.
        mask: Likewise.

    Returns:
        The parallel part, like ``grad``.

    Example:
        >>> q = torch.tensor([[1.0], [1.0], [0.0]])
        >>> span(torch.tensor([[3.0], [1.0], [5.0]]), q, q).round(decimals=4).squeeze(-1)
        tensor([2., 2., 0.])
    """
    return project(basis, grad, ridge=ridge, mask=mask)


def cross(
    grad: Tensor,
    basis: Tensor,
    other: Tensor,
    *,
    ridge: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Project onto the column space of the other side: of K for a gradient of Q.

    Args:
        grad: As in :class:`Setup`.
        basis: Likewise.
        other: Likewise, with as many tokens as ``basis``.
        ridge: Likewise.
        mask: Likewise.

    Returns:
        The parallel part, like ``grad``.

    Raises:
        ValueError: Other numbers of tokens on the two sides.

    Example:
        >>> k = torch.tensor([[1.0], [1.0], [0.0]])
        >>> q = torch.tensor([[0.0], [0.0], [2.0]])
        >>> cross(torch.tensor([[3.0], [1.0], [5.0]]), q, k).round(decimals=4).squeeze(-1)
        tensor([2., 2., 0.])
    """
    _check_tokens("cross", basis, other)
    return project(other, grad, ridge=ridge, mask=mask)


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
        grad: As in :class:`Setup`.
        basis: Likewise.
        other: Likewise, with as many tokens as ``basis``.
        ridge: Likewise, for both spans.
        mask: Likewise.

    Returns:
        The parallel part, like ``grad``.

    Raises:
        ValueError: Other numbers of tokens on the two sides.

    Example:
        >>> q = torch.tensor([[1.0], [0.0]])
        >>> k = torch.tensor([[1.0], [1.0]])
        >>> oblique(torch.tensor([[3.0], [1.0]]), q, k).round(decimals=1).squeeze(-1)
        tensor([4., 0.])
    """
    _check_tokens("oblique", basis, other)
    onto = orthonormal(basis, ridge=ridge, mask=mask)
    along = orthonormal(other, ridge=ridge, mask=mask)
    cosines = along.mT @ onto
    identity = torch.eye(cosines.shape[-1], dtype=cosines.dtype, device=cosines.device)
    factor, _ = torch.linalg.cholesky_ex(cosines.mT @ cosines + _OBLIQUE_RIDGE * identity)
    x = cosines.mT @ (along.mT @ grad.to(onto.dtype))
    return (onto @ torch.cholesky_solve(x, factor)).to(grad.dtype)


def radial(
    grad: Tensor,
    basis: Tensor,
    other: Tensor,
    *,
    ridge: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Project each token's gradient onto the direction of its own query (or key) vector.

    Args:
        grad: As in :class:`Setup`.
        basis: Likewise.
        other: Not used.
        ridge: Not used.
        mask: Likewise.

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


def feature(
    grad: Tensor,
    basis: Tensor,
    other: Tensor,
    *,
    ridge: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Project each token's gradient onto the leading feature directions of the other side.

    Those are the right singular directions of K (for a gradient of Q) that carry 90 % of its
    squared norm.

    Args:
        grad: As in :class:`Setup`.
        basis: Not used.
        other: Likewise.
        ridge: Not used.
        mask: Likewise; of the other side all tokens count.

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


def pooled(
    grad: Tensor,
    basis: Tensor,
    other: Tensor,
    *,
    ridge: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Project onto the span of a head's queries (or keys) over the whole batch.

    One X is solved for all sequences, and each sequence's part is Q_i X.

    Args:
        grad: As in :class:`Setup`, shape ``(B, ..., N, d)``.
        basis: Likewise.
        other: Not used.
        ridge: Likewise.
        mask: Likewise.

    Returns:
        The parallel part, like ``grad``.

    Example:
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


SETUPS: dict[str, Setup] = {
    "span": span,
    "cross": cross,
    "oblique": oblique,
    "radial": radial,
    "feature": feature,
    "pooled": pooled,
}


NEED_OTHER = frozenset({"cross", "oblique", "feature"})


def setup_name(setup: str | Setup) -> str:
    """Return the name of a setup, under which it is found in ``SETUPS`` from then on.

    Args:
        setup: A name, or a function as :class:`Setup` describes it.

    Returns:
        The name; a function's is that of its module and its own.

    Raises:
        TypeError: Neither.
        ValueError: A name that is not there.

    Example:
        >>> setup_name("cross")
        'cross'
        >>> setup_name(lambda grad, basis, other, *, ridge=None, mask=None: 0 * grad)
        'spanopt.setups.<lambda>'
    """
    if isinstance(setup, str):
        if setup not in SETUPS:
            raise ValueError(
                f"no projection is named {setup!r}: there are {', '.join(SETUPS)}; or pass a "
                "function (grad, basis, other, *, ridge=None, mask=None)"
            )
        return setup
    if not callable(setup):
        raise TypeError(
            f"a projection is one of {', '.join(SETUPS)} or a function (grad, basis, other, *, "
            f"ridge=None, mask=None), got {setup!r}"
        )
    for known, other in SETUPS.items():
        if other is setup:
            return known
    own = getattr(setup, "__qualname__", type(setup).__qualname__)
    name = base = f"{getattr(setup, '__module__', '')}.{own}"
    count = 1
    while name in SETUPS:
        count += 1
        name = f"{base} {count}"
    SETUPS[name] = setup
    return name


def _check_tokens(name: str, basis: Tensor, other: Tensor) -> None:
    if basis.shape[:-1] != other.shape[:-1]:
        raise ValueError(
            f"the projection {name!r} needs queries and keys of equal number, got "
            f"{tuple(basis.shape)} and {tuple(other.shape)}"
        )
