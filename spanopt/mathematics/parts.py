"""The parallel part of a gradient, its violation, and an orthonormal basis of the span."""

from __future__ import annotations

from torch import Tensor

from spanopt.mathematics.checks import check_tensors
from spanopt.mathematics.formulations import combined
from spanopt.mathematics.whitening import orthonormal_basis

__all__ = ["decompose", "orthonormal", "project"]


def project(
    basis: Tensor, x: Tensor, *, ridge: float | None = None, mask: Tensor | None = None
) -> Tensor:
    r"""Project ``x`` onto the column space of ``basis``.

    Computes :math:`P x` with :math:`P = Q (Q^T Q + \rho I)^{-1} Q^T`, where
    :math:`\rho = \mathrm{ridge} \cdot \lVert Q \rVert_F^2`. Let :math:`\sigma_i` be the singular
    values of the basis. Each direction of the span is kept with the weight
    :math:`\sigma_i^2 / (\sigma_i^2 + \rho)`. This is one for all but near-dependent columns. It is
    one half at :math:`\sigma_i = \sqrt{\mathrm{ridge}} \lVert Q \rVert_F`, and zero for a null
    direction. So a rank-deficient basis gives the projector of its numerical rank, and a zero basis
    gives zero.

    Args:
        basis: Q, shape ``(..., N, d)``, floating point. It counts as a constant: no gradient flows
            to it.
        x: The tensor to project, shape ``(..., N, m)`` with the leading dimensions of ``basis``.
        ridge: Relative ridge. The default is :func:`default_ridge` of the dtype computed in. A
            smaller ridge is replaced by the default. It drops singular values below about 3e-6
            (float32) or 3e-13 (float64) of the norm, which rounding blurs anyway.
        mask: Boolean, shape ``(..., N)``, true at real tokens. The span is that of the real tokens
            alone, and the result is zero at the others.

    Returns:
        ``P x``, with the shape and dtype of ``x``. float16 and bfloat16 are computed in float32.
        Where ``basis`` or ``x`` is not finite the result is not finite. Any finite basis is
        accepted. Where it is needed, each matrix is first multiplied by a power of two, so that no
        square of an entry overflows and none that matters underflows.

    Raises:
        TypeError: A dtype is not real floating point, or the mask is not boolean.
        ValueError: Shapes do not fit, or the ridge is negative or not finite.

    Source: the projectors P_Q and P_K of the span decomposition; see ``docs/method.md``.

    Example:
        >>> import torch
        >>> q = torch.tensor([[1.0], [1.0], [0.0]])
        >>> project(q, torch.tensor([[3.0], [1.0], [5.0]])).round(decimals=4).squeeze(-1)
        tensor([2., 2., 0.])
    """
    check_tensors(basis, x, ridge, mask)
    return combined(basis, x, ridge=ridge, mask=mask)


def orthonormal(basis: Tensor, *, ridge: float | None = None, mask: Tensor | None = None) -> Tensor:
    """Return a basis of the same column space with near-orthonormal columns.

    Args:
        basis: Q, as in :func:`project`.
        ridge: Relative ridge; ``None`` for the dtype's default, as in :func:`project`.
        mask: Boolean, shape ``(..., N)``, true at real tokens. The span is that of the real tokens
            alone, and the result is zero at the others.

    Returns:
        U, shaped like ``basis``, in the dtype that is computed in, with ``U U^T = P``. Its columns
        lie in the span of Q. If Q is rank-deficient, U has short columns for null directions.

    Raises:
        TypeError: A dtype is not real floating point, or the mask is not boolean.
        ValueError: Shapes do not fit, or the ridge is negative or not finite.

    Example:
        >>> import torch
        >>> orthonormal(torch.tensor([[3.0], [4.0]])).round(decimals=4).squeeze(-1)
        tensor([0.6000, 0.8000])
    """
    check_tensors(basis, basis, ridge, mask)
    return orthonormal_basis(basis, ridge=ridge, mask=mask)


def decompose(
    grad: Tensor, basis: Tensor, *, ridge: float | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split a gradient into its parallel part and its violation.

    Args:
        grad: Gradient of the basis, shape ``(..., N, d)``.
        basis: Q (for a query gradient) or K (for a key gradient), shape ``(..., N, d)``.
        ridge: Relative ridge: singular values of ``basis`` below about its square root times the
            norm are dropped. ``None`` is :func:`default_ridge` of the dtype computed in.
        mask: Boolean, shape ``(..., N)``, true at real tokens; ``None`` if all are. The span is
            that of the real tokens. At the other tokens the whole gradient is violation.

    Returns:
        ``(parallel, violation)``, each like ``grad``. They add up to ``grad``.

    Raises:
        TypeError: A dtype is not real floating point, or the mask is not boolean.
        ValueError: Shapes do not fit, or the ridge is negative or not finite.

    Source: dL/dQ = P_Q dL/dQ + (I - P_Q) dL/dQ, orders 0 and 1; see ``docs/method.md``.

    Example:
        >>> import torch
        >>> q = torch.tensor([[1.0], [1.0], [0.0]])
        >>> parallel, violation = decompose(torch.tensor([[3.0], [1.0], [5.0]]), q)
        >>> parallel.round(decimals=4).squeeze(-1), violation.round(decimals=4).squeeze(-1)
        (tensor([2., 2., 0.]), tensor([ 1., -1.,  5.]))
    """
    parallel = project(basis, grad, ridge=ridge, mask=mask)
    return parallel, grad - parallel
