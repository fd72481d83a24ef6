"""The span of a basis by CholeskyQR2, which takes only matrix products and d x d factorisations.

The condition number of the Gram matrix Q^T Q is the square of Q's. So one Cholesky factorisation of
it would lose half the digits. The functions here whiten the basis with a first, shifted
factorisation. Then they solve with the Gram matrix of the whitened basis (CholeskyQR2: Yamamoto et
al., 2015; the shift: Fukaya et al., 2020). Nothing waits for a device: values are read on a CPU
alone, where that saves time, and what is read changes no digit of the result.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from spanopt.mathematics.checks import can_be_read
from spanopt.mathematics.factors import inverse_factor, solve
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
            solution, failed = solve(self.gram, right, self.identity)
            failed = failed + self.failed
        return _weighted(solution, failed, self.leading, factor)

    def orthonormal(self) -> Tensor:
        """Return U with U U^T = P, shape (matrices, N, d)."""
        inverse, failed = inverse_factor(self.gram, self.identity)
        return torch.bmm(self.whitened, _weighted(inverse, failed + self.failed, self.leading))


def _weighted(
    x: Tensor, failed: Tensor, leading: torch.Size, factor: Tensor | None = None
) -> Tensor:
    """Return matrices times a factor; those for which a factorisation failed become NaN."""
    if can_be_read(failed) and not failed.any():
        if factor is None or factor.ndim == 0:
            return x if factor is None else x * factor
        return x * factor.expand(*leading, 1, 1).reshape(-1, 1, 1)
    missing = (failed > 0).view(*leading, 1, 1)
    weights = torch.where(missing, torch.nan, 1.0 if factor is None else factor)
    return x * weights.view(-1, 1, 1)


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
    default = default_ridge(dtype)
    ridge = max(default, ridge or 0.0)
    shift = max(shift_for(matmul_eps(dtype)), ridge)
    q, gram, trace = _shifted_gram(basis.detach(), mask, dtype, shift, total)
    make_identity = _kept_identity if can_be_read(q) else _identity
    identity = make_identity(q.shape[-1], dtype, q.device)
    inverse, failed = inverse_factor(gram, identity)
    whitened = torch.bmm(q, inverse)
    del q  # its memory can be reused for the next buffer
    if ridge == default and total is None and whitened.device.type == "cpu":
        # As T^T (Q^T Q + shift I) T = I, shift T^T T = I - A^T A. That is exact enough for a ridge
        # far below the shift.
        part = ridge / shift
        gram = torch.baddbmm(identity, whitened.mT, whitened, beta=part, alpha=1 - part)
    else:
        gram = gram_of(whitened)
        gram = gram if total is None else total(gram)
        gram = torch.baddbmm(gram, (inverse * trace.unsqueeze(-1)).mT, inverse, alpha=ridge)
    return Span(whitened, gram, identity, failed, ridge == shift, basis.shape[:-2])


def _shifted_gram(
    basis: Tensor, mask: Tensor | None, dtype: torch.dtype, shift: float, total: Total | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q as (matrices, N, d), its Gram matrix with the shift, and the trace without it.

    Where values can be read without waiting, Q is scaled only if that is needed: scaling by powers
    of two changes no digit of the span.
    """
    if total is None and can_be_read(basis):
        q = matrices(basis, mask, dtype)
        gram = gram_of(q)
        trace = add_shift(gram, shift)
        kind = torch.finfo(dtype)
        least, most = (x.item() for x in trace.aminmax())
        if kind.tiny**0.5 < least and most < kind.max**0.75:
            return q, gram, trace
    q = _scaled(basis, mask, dtype, total)
    gram = gram_of(q)
    gram = gram if total is None else total(gram)
    return q, gram, add_shift(gram, shift)


def _identity(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(d, dtype=dtype, device=device)


@lru_cache(maxsize=16)
def _kept_identity(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # autograd may use what is kept
        return _identity(d, dtype, device)


def matrices(x: Tensor, mask: Tensor | None, dtype: torch.dtype, *, copy: bool = False) -> Tensor:
    """Return x as (matrices, N, d), with zeros at masked tokens. It may be a view of x."""
    shape = x.shape[:-2].numel(), *x.shape[-2:]
    if mask is None and not copy and x.dtype == dtype:
        return x.reshape(shape)
    x = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if mask is not None:
        _clear(x, ~mask.unsqueeze(-1))
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
