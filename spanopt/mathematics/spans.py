"""The span of a basis by CholeskyQR2, which takes only matrix products and d x d factorisations.

The condition number of the Gram matrix Q^T Q is the square of Q's. So one Cholesky factorisation of
it would lose half the digits. The functions here whiten the basis with a first, shifted
factorisation. Then they solve with the Gram matrix of the whitened basis (CholeskyQR2: Yamamoto et
al., 2015; the shift: Fukaya et al., 2020). No code branches on a value or waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from spanopt.mathematics.factors import inverse_factor
from spanopt.mathematics.gram import add_shift, gram_of, shift_for
from spanopt.mathematics.magnitudes import inverse_power, largest_entries
from spanopt.mathematics.precision import default_ridge, matmul_eps

__all__ = ["Span", "Total", "matrices", "span_of"]

Total: TypeAlias = Callable[..., Tensor]
"""``total(part, operation="sum")``: the sum, or with ``"max"`` the maximum, over processes."""


class Span(NamedTuple):
    """A whitened basis A = Q T, with P = A (A^T A + rho T^T T)^{-1} A^T.

    Attributes:
        whitened: A, whose columns are near-orthonormal, shape (matrices, N, d).
        gram: A^T A + rho T^T T, shape (matrices, d, d).
        identity: Shape (d, d).
        failed: For each matrix an integer, above 0 if T does not exist.
        is_identity: Whether ``gram`` is the identity up to rounding.
        leading: The leading dimensions of the basis.
    """

    whitened: Tensor
    gram: Tensor
    identity: Tensor
    failed: Tensor
    is_identity: bool
    leading: torch.Size

    def coefficients(self, right: Tensor, factor: Tensor | None) -> Tensor:
        """Return ``factor (A^T A + rho T^T T)^{-1} right``: the weights of the columns of A.

        Args:
            right: A^T x, shape (matrices, d, m).
            factor: Shape ``()`` or ``(H, 1, 1)``, or ``None`` for 1.
        """
        if self.is_identity:
            # gram = I + E, where E comes from rounding and is well below 1. After three steps of
            # Richardson's iteration the error is the fourth power of E.
            solution, failed = right, self.failed
            for _ in range(3):
                solution = torch.baddbmm(solution + right, self.gram, solution, alpha=-1)
        else:
            inverse, failed = inverse_factor(self.gram, self.identity)
            failed = failed + self.failed
            solution = torch.bmm(inverse, torch.bmm(inverse.mT, right))
        # Multiplying the smallest matrix by the factor saves passes over the larger ones.
        return solution * self._weights(failed, factor)

    def orthonormal(self) -> Tensor:
        """Return U with U U^T = P, shape (matrices, N, d)."""
        inverse, failed = inverse_factor(self.gram, self.identity)
        return torch.bmm(self.whitened, inverse * self._weights(failed + self.failed, None))

    def _weights(self, failed: Tensor, factor: Tensor | None) -> Tensor:
        """Return each matrix's factor, shape (matrices, 1, 1): NaN if a factorisation failed."""
        missing = (failed > 0).view(*self.leading, 1, 1)
        return torch.where(missing, torch.nan, 1.0 if factor is None else factor).view(-1, 1, 1)


def span_of(
    basis: Tensor,
    mask: Tensor | None,
    ridge: float | None,
    dtype: torch.dtype,
    total: Total | None = None,
) -> Span:
    """Return the span of a basis.

    T is the inverse of a Cholesky factor of the shifted Gram matrix. Whatever T is,
    A (A^T A + rho T^T T)^{-1} A^T = Q (Q^T Q + rho I)^{-1} Q^T, so the shift costs no accuracy.

    Args:
        basis: Q, shape ``(..., N, d)``. It counts as a constant.
        mask: Boolean, broadcastable to ``(..., N)``, true at real tokens, or ``None``.
        ridge: The ridge as the user gave it.
        dtype: The dtype to compute in.
        total: Given where tokens are spread over processes; see :func:`spanopt.rescale`.
    """
    ridge = max(default_ridge(dtype), ridge or 0.0)
    shift = shift_for(matmul_eps(dtype))
    q = _scaled(basis.detach(), mask, dtype, total)
    gram = gram_of(q)
    gram = gram if total is None else total(gram)
    trace = add_shift(gram, max(shift, ridge))
    identity = torch.eye(q.shape[-1], dtype=dtype, device=q.device)
    inverse, failed = inverse_factor(gram, identity)
    whitened = torch.bmm(q, inverse)
    del q  # its memory can be reused for the next buffer
    gram = gram_of(whitened)
    gram = gram if total is None else total(gram)
    gram = torch.baddbmm(gram, (inverse * trace[..., None]).mT, inverse, alpha=ridge)
    return Span(whitened, gram, identity, failed, ridge >= shift, basis.shape[:-2])


def matrices(x: Tensor, mask: Tensor | None, dtype: torch.dtype, *, copy: bool = False) -> Tensor:
    """Return x as (matrices, N, d), with zeros at masked tokens. It may be a view of x."""
    shape = x.shape[:-2].numel(), *x.shape[-2:]
    if mask is None and not copy and x.dtype == dtype:
        return x.reshape(shape)
    x = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if mask is not None:
        _clear(x, ~mask[..., None])
    return x.view(shape)


def _clear(x: Tensor, where: Tensor) -> None:
    """Set x to zero where a condition holds, in place."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        x.masked_fill_(where, 0)
    else:  # on a CPU clearing bits takes a ninth of the time, but it has no derivative
        integer = torch.int64 if x.dtype == torch.float64 else torch.int32
        x.view(integer).bitwise_and_(where.to(integer).sub_(1))


def _scaled(basis: Tensor, mask: Tensor | None, dtype: torch.dtype, total: Total | None) -> Tensor:
    """Return a copy of the basis as (matrices, N, d), each matrix times a power of two.

    The largest entry of each matrix is then about 1. This changes no span. It also changes no digit
    except in entries below the smallest normal number. Squares of float16 numbers never leave the
    range of float32, so float16 needs no scaling.
    """
    q = matrices(basis, mask, dtype, copy=True)
    if basis.dtype == torch.float16:
        return q
    largest = largest_entries(q)
    if total is not None:  # every process must scale its tokens by the same power
        largest = total(largest, "max")
    return q.mul_(inverse_power(largest))
