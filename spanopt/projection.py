"""Projection onto the span of a query or key matrix: pure tensor functions.

The *span* of a basis Q (``N`` tokens by ``d`` features) is its column space, a subspace of token
space R^N. Its orthogonal projector is P = Q (Q^T Q)^+ Q^T, and a gradient g of Q splits exactly
into a *parallel* part P g and a *violation* g - P g.

The Gram matrix Q^T Q squares the condition number of Q, so one Cholesky factorisation of it would
lose half the digits. The functions here whiten the basis with a first, shifted factorisation and
solve with the Gram matrix of the whitened basis (CholeskyQR2: Yamamoto et al., 2015; the shift:
Fukaya et al., 2020), all matrix products and d x d factorisations: 10 N d^2 floating-point
operations, no iteration, no branch on a value, no host synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "decompose",
    "default_ridge",
    "orthonormal",
    "project",
    "rescale",
    "rescale_by_document",
]

Total: TypeAlias = Callable[..., Tensor]
"""``total(part, operation="sum")``: over processes, the sum of their parts, or the ``"max"``."""


def project(
    basis: Tensor, x: Tensor, *, ridge: float | None = None, mask: Tensor | None = None
) -> Tensor:
    r"""Project ``x`` onto the column space of ``basis``.

    Computes :math:`P x` with :math:`P = Q (Q^T Q + \rho I)^{-1} Q^T`, where
    :math:`\rho = \mathrm{ridge} \cdot \lVert Q \rVert_F^2`. In terms of the singular values
    :math:`\sigma_i` of the basis, each direction of the span is kept with the weight
    :math:`\sigma_i^2 / (\sigma_i^2 + \rho)`: one for all but near-dependent columns, one half at
    :math:`\sigma_i = \sqrt{\mathrm{ridge}} \lVert Q \rVert_F`, zero for a null direction. So a
    rank-deficient basis gives the projector of its numerical rank, and a zero basis gives zero.

    Args:
        basis: Q, shape ``(..., N, d)``, floating point. Treated as a constant: no gradient flows
            to it.
        x: What is projected, shape ``(..., N, m)`` with the leading dimensions of ``basis``.
        ridge: Relative ridge. The default, which is also the least that is taken, is
            :func:`default_ridge` of the dtype computed in: it drops singular values below about
            3e-6 (float32) or 3e-13 (float64) of the norm, which rounding blurs anyway.
        mask: Boolean, shape ``(..., N)``, true at real tokens. The span is that of the real tokens
            alone, and the result is zero at the others.

    Returns:
        ``P x``, with the shape and dtype of ``x``. float16 and bfloat16 are computed in float32.
        Where ``basis`` or ``x`` is not finite the result is not finite. Any finite basis is
        accepted: each matrix is first multiplied by a power of two, so that no square of an entry
        overflows and none that matters underflows.

    Raises:
        TypeError: A dtype that is not real floating point, or a mask that is not boolean.
        ValueError: Shapes that do not fit, or a ridge that is negative or not finite.

    Source: the projectors P_Q and P_K of the span decomposition; see ``docs/method.md``.

    Example:
        >>> import torch
        >>> q = torch.tensor([[1.0], [1.0], [0.0]])
        >>> project(q, torch.tensor([[3.0], [1.0], [5.0]])).round(decimals=4).squeeze(-1)
        tensor([2., 2., 0.])
    """
    _check(basis, x, ridge, mask)
    return _project(basis, x, ridge, mask).to(x.dtype)


def orthonormal(basis: Tensor, *, ridge: float | None = None, mask: Tensor | None = None) -> Tensor:
    """Return a basis of the same column space with near-orthonormal columns.

    Args:
        basis: Q, as in :func:`project`.
        ridge: Likewise.
        mask: Likewise.

    Returns:
        U, shaped like ``basis``, in the dtype that is computed in, with ``U U^T = P``. Where Q is
        rank-deficient its columns span no more than Q's, and those of null directions are short.

    Raises:
        TypeError: As in :func:`project`.
        ValueError: As in :func:`project`.

    Example:
        >>> import torch
        >>> orthonormal(torch.tensor([[3.0], [4.0]])).round(decimals=4).squeeze(-1)
        tensor([0.6000, 0.8000])
    """
    _check(basis, basis, ridge, mask)
    dtype = _compute_dtype(basis.dtype)
    if basis.numel() == 0:
        return torch.zeros_like(basis, dtype=dtype)
    ridge = max(default_ridge(dtype), ridge or 0.0)
    with _full_precision(basis.device.type):
        whitened, inverse, valid = _factored(_scaled(basis, mask, dtype, None), ridge, None)
        return (whitened @ (inverse * valid)).reshape(basis.shape)


def decompose(
    grad: Tensor, basis: Tensor, *, ridge: float | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split a gradient into its parallel span and its span violation.

    Args:
        grad: Gradient of the basis, shape ``(..., N, d)``.
        basis: Q (for a query gradient) or K (for a key gradient), shape ``(..., N, d)``.
        ridge: As in :func:`project`.
        mask: As in :func:`project`. At masked tokens all of the gradient is violation.

    Returns:
        ``(parallel, violation)``, each like ``grad``; they add up to ``grad``.

    Raises:
        TypeError: As in :func:`project`.
        ValueError: As in :func:`project`.

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


def rescale(
    grad: Tensor,
    basis: Tensor,
    *,
    parallel: float | Tensor,
    violation: float | Tensor,
    ridge: float | None = None,
    mask: Tensor | None = None,
    total: Total | None = None,
) -> Tensor:
    """Scale the parallel span and the span violation of a gradient and add them up again.

    Computes ``parallel * P g + violation * (g - P g)``. It is linear in ``grad``, so it commutes
    with loss scaling and gradient accumulation. Two equal numbers need no projection: the result
    is then ``parallel * grad``, and ``grad`` itself when both are 1. With the number 0 for
    ``violation`` the projection is all there is.

    Args:
        grad: Gradient of the basis, shape ``(..., N, d)``.
        basis: Q or K, shape ``(..., N, d)``.
        parallel: Factor of the parallel span: a number, or a tensor of shape ``()`` or ``(H,)``,
            one value per head, where the gradient is ``(..., H, N, d)``.
        violation: Factor of the violation, likewise.
        ridge: As in :func:`project`.
        mask: As in :func:`project`. Masked tokens are multiplied by ``violation``.
        total: Where the tokens of a sequence are spread over processes, each of which makes this
            call with its own: ``total(part)`` returns the sum of a tensor over them, and
            ``total(part, "max")`` the elementwise maximum.

    Returns:
        The rescaled gradient, with the shape and dtype of ``grad``.

    Raises:
        TypeError: As in :func:`project`.
        ValueError: As in :func:`project`, or a factor whose shape is neither ``()`` nor ``(H,)``.

    Source: g' = b g + (a - b) P g; see ``docs/method.md``.

    Example:
        >>> import torch
        >>> q = torch.tensor([[1.0], [1.0], [0.0]])
        >>> g = torch.tensor([[3.0], [1.0], [5.0]])
        >>> rescale(g, q, parallel=2.0, violation=1.0).round(decimals=4).squeeze(-1)
        tensor([5., 3., 5.])
    """
    _check(basis, grad, ridge, mask)
    _check_factors(grad, parallel, violation)
    numbers = not isinstance(parallel, Tensor) and not isinstance(violation, Tensor)
    if numbers and parallel == violation:
        return grad if parallel == 1 else grad * parallel
    dtype = _compute_dtype(torch.promote_types(basis.dtype, grad.dtype))
    a, b = (_per_head(factor, dtype, grad.device) for factor in (parallel, violation))
    scaled = _project(basis, grad, ridge, mask, factor=a - b, total=total)
    if isinstance(violation, Tensor) or violation != 0:
        scaled.addcmul_(grad.to(dtype), b)
    return scaled.to(grad.dtype)


def rescale_by_document(
    grad: Tensor,
    basis: Tensor,
    index: Tensor,
    *,
    parallel: float | Tensor,
    violation: float | Tensor,
    ridge: float | None = None,
) -> Tensor:
    """Rescale a gradient where several documents are packed into a sequence, each with its span.

    Args:
        grad: Gradient of the basis, shape ``(B, ..., N, d)``.
        basis: Q or K, shape ``(B, ..., N, d)``.
        index: Integers, shape ``(T, L)``: the positions of the tokens of T documents among the
            ``B * N`` of the batch, each row filled up with ``B * N``.
        parallel: As in :func:`rescale`.
        violation: As in :func:`rescale`. Tokens of no document are multiplied by it.
        ridge: As in :func:`project`.

    Returns:
        The rescaled gradient, with the shape and dtype of ``grad``.

    Raises:
        TypeError: As in :func:`project`.
        ValueError: As in :func:`rescale`.

    Example:
        >>> import torch
        >>> q, g = torch.ones(1, 4, 1), torch.tensor([[[1.0], [3.0], [5.0], [6.0]]])
        >>> documents = torch.tensor([[0, 1], [2, 4]])  # of 2 and of 1 tokens, then padding
        >>> rescale_by_document(g, q, documents, parallel=2.0, violation=1.0).round().flatten()
        tensor([ 3.,  5., 10.,  6.])
    """
    _check(basis, grad, ridge, None)
    _check_factors(grad, parallel, violation)
    batch, length = grad.shape[0], grad.shape[-2]

    def by_token(x: Tensor) -> Tensor:  # (B * N + 1, ..., d), the last row for what is filled up
        rows = x.movedim(-2, 1).flatten(0, 1)
        return torch.cat([rows, torch.zeros_like(rows[:1])])

    real = index < batch * length
    scaled = rescale(
        by_token(grad)[index].movedim(1, -2),
        by_token(basis.detach())[index].movedim(1, -2),
        parallel=parallel,
        violation=violation,
        ridge=ridge,
        mask=real.reshape(len(index), *(1,) * (grad.ndim - 3), index.shape[1]),
    )
    b = _per_head(violation, _compute_dtype(grad.dtype), grad.device)
    tokens = by_token((grad * b).to(grad.dtype))
    tokens = tokens.index_copy(0, index.flatten(), scaled.movedim(-2, 1).flatten(0, 1))
    return tokens[:-1].unflatten(0, (batch, length)).movedim(1, -2)


def default_ridge(dtype: torch.dtype) -> float:
    """Return the relative ridge that :func:`project` takes for a basis of this dtype.

    It is ``eps ** 1.6`` for the rounding unit ``eps`` in which the matrix products are done:
    8e-12 in float32 (also for float16 and bfloat16, which are computed in float32) and 9e-26 in
    float64. When ``torch.set_float32_matmul_precision`` allows float32 products on fewer bits,
    ``eps`` is theirs.

    Args:
        dtype: A real floating-point dtype.

    Returns:
        The ridge, relative to the squared Frobenius norm of the basis.

    Example:
        >>> import torch
        >>> f"{default_ridge(torch.float64):.0e}"
        '9e-26'
    """
    return float(_matmul_eps(_compute_dtype(dtype)) ** 1.6)


def check_ridge(ridge: float | None) -> None:
    """Refuse a ridge that is negative or not finite.

    Args:
        ridge: As in :func:`project`.

    Raises:
        TypeError: It is no number.
        ValueError: It is negative or not finite.

    Example:
        >>> check_ridge(-1.0)
        Traceback (most recent call last):
        ...
        ValueError: the ridge must be finite and at least 0, got -1.0
    """
    if ridge is not None and not isinstance(ridge, (int, float)):
        raise TypeError(f"the ridge must be a number, got {ridge!r}")
    if ridge is not None and not 0 <= ridge < float("inf"):
        raise ValueError(f"the ridge must be finite and at least 0, got {ridge}")


def _project(
    basis: Tensor,
    x: Tensor,
    ridge: float | None,
    mask: Tensor | None,
    factor: Tensor | None = None,
    total: Total | None = None,
) -> Tensor:
    """Return P x, times the factor if there is one, in the compute dtype."""
    dtype = _compute_dtype(torch.promote_types(basis.dtype, x.dtype))
    # A process without tokens still takes part in the sums.
    if total is None and (basis.numel() == 0 or x.numel() == 0):
        return torch.zeros_like(x, dtype=dtype)
    ridge = max(default_ridge(dtype), ridge or 0.0)
    with _full_precision(basis.device.type):
        # Copies have no name: each is gone, for the next buffer to take its place, once it is used.
        whitened, inverse, weight = _factored(_scaled(basis, mask, dtype, total), ridge, total)
        if factor is not None:
            by_head = weight.reshape(*basis.shape[:-2], 1, 1) * factor
            weight = by_head.reshape(weight.shape)
        # The weight goes on the smallest matrix, which saves passes over the others.
        inner = _total(whitened.mT @ _matrices(x, mask, dtype), total)
        coefficients = inverse @ ((inverse * weight).mT @ inner)
        return (whitened @ coefficients).reshape(x.shape)


def _matrices(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x as (matrices, N, d), with zeros for masked tokens; it may be a view of x."""
    shape = x.shape[:-2].numel(), *x.shape[-2:]
    if mask is None:  # a copy, if it takes one, saves one in each product
        return x.to(dtype).reshape(shape)
    x = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return x.masked_fill_(~mask[..., None], 0).view(shape)


def _scaled(basis: Tensor, mask: Tensor | None, dtype: torch.dtype, total: Total | None) -> Tensor:
    """Return a copy of the basis as (matrices, N, d), each times a power of two.

    The largest entry of each matrix is then about 1, which changes no span and, but for entries
    below the smallest normal number, no digit.
    """
    q = basis.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    q = q.view(basis.shape[:-2].numel(), *basis.shape[-2:])
    if mask is not None:
        q = q.view(basis.shape).masked_fill_(~mask[..., None], 0).view(q.shape)
    largest = largest_entries(q)
    if total is not None:  # every process has to scale its tokens alike
        largest = total(largest, "max")
    return q.mul_(inverse_power(largest))


def largest_entries(x: Tensor) -> Tensor:
    """Return the largest absolute value in each matrix (..., N, d), shape (..., 1, 1).

    It is NaN where the matrix holds one, and 0 where the matrix is empty.
    """
    if 0 in x.shape[-2:]:
        return x.new_zeros(*x.shape[:-2], 1, 1)
    # Two reductions are faster than one over a copy of absolute values.
    return torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True))


def inverse_power(x: Tensor) -> Tensor:
    """Return a power of two near 1 / x, without rounding: x times it is at least 1 and below 4.

    It is taken from the bits of the exponent. Numbers below the smallest normal one, and zero, get
    the largest power that there is; infinity and NaN get the smallest.
    """
    integer, bits = (torch.int64, 52) if x.dtype == torch.float64 else (torch.int32, 23)
    one = 1 << bits  # the last bit of the exponent
    exponent = (1 << (torch.finfo(x.dtype).bits - 1)) - one
    # The bias of the exponent, twice, is its largest value for a finite number.
    return (exponent - one - (x.view(integer) & exponent)).clamp(min=one).view(x.dtype)


def _full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Keep autocast from sending matrix products to half precision."""
    if _has_autocast(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _factored(q: Tensor, ridge: float, total: Total | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return A and T with P = A T (A T)^T, and for each matrix 1, or NaN if there are none."""
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    identity = identity.expand(q.shape[0], -1, -1).contiguous()
    whitened, gram, failed = _whiten(q, ridge, identity, total)
    inverse, failed_again = _inverse_factor(gram, identity)
    valid = torch.ones_like(failed, dtype=q.dtype).masked_fill(failed + failed_again > 0, torch.nan)
    return whitened, inverse, valid[:, None, None]


def _whiten(
    q: Tensor, ridge: float, identity: Tensor, total: Total | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return A = Q T with near-orthonormal columns, A^T A + rho T^T T, and where it failed.

    T is the inverse of a Cholesky factor of the shifted Gram matrix. Whatever T is,
    A (A^T A + rho T^T T)^{-1} A^T = Q (Q^T Q + rho I)^{-1} Q^T, so the shift costs no accuracy.
    """
    gram = _total(q.mT @ q, total)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    trace = diagonal.sum(-1, keepdim=True)
    trace = trace.masked_fill(trace == 0, 1)  # any scale will do for a zero basis
    # Large enough against the rounding errors of the Gram matrix for the factor to exist.
    shift = max(8 * _matmul_eps(gram.dtype), ridge)
    diagonal.add_(trace, alpha=shift)
    inverse, failed = _inverse_factor(gram, identity)
    whitened = q @ inverse
    ridged = (inverse * (ridge * trace)[..., None]).mT
    gram = torch.baddbmm(_total(whitened.mT @ whitened, total), ridged, inverse)
    return whitened, gram, failed


def _total(part: Tensor, total: Total | None) -> Tensor:
    return part if total is None else total(part)


def _inverse_factor(matrix: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
    """Return T = L^{-T}, so that T T^T inverts matrix = L L^T, and above 0 where there is none."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    # Solving T L^T = I, both in column-major order, is twice as fast as L T^T = I on a CPU.
    return torch.linalg.solve_triangular(factor.mT, identity.mT, upper=True, left=False), failed


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _matmul_eps(dtype: torch.dtype) -> float:
    """Rounding unit of a matrix product of this dtype, as the user's settings allow it."""
    if dtype == torch.float32 and _float32_products_are_shortened():
        return 2.0**-10
    return torch.finfo(dtype).eps


def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _float32_products_are_shortened() -> bool:
    return torch.get_float32_matmul_precision() != "highest"


# As torch.compiler.assume_constant_result does, which takes seconds to import the compiler. Torch
# 2.6 traces neither function, and takes a bool for a constant but no float.
_constants: tuple[Any, ...] = (_has_autocast, _float32_products_are_shortened)
for _constant in _constants:
    _constant._dynamo_marked_constant = True


def _per_head(factor: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    factor = torch.as_tensor(factor, dtype=dtype, device=device)
    return factor[..., None, None] if factor.ndim else factor


def _check(basis: Tensor, x: Tensor, ridge: float | None, mask: Tensor | None) -> None:
    for name, tensor in (("basis", basis), ("gradient", x)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"the {name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:  # torch 2.6 traces no tensor.is_*() in a backward
            raise TypeError(f"the {name} must be real floating point, got {tensor.dtype}")
        if not torch.compiler.is_compiling() and tensor.layout != torch.strided:
            raise TypeError(f"the {name} must be a dense tensor, got {tensor.layout}")
    if basis.ndim < 2 or x.ndim < 2 or basis.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            "basis and gradient must be (..., N, d) with equal leading dimensions and tokens, "
            f"got {tuple(basis.shape)} and {tuple(x.shape)}"
        )
    check_ridge(ridge)
    if mask is None:
        return
    if getattr(mask, "dtype", None) != torch.bool:
        found = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"the mask must be boolean, true at real tokens, got {found}")
    try:
        fits = torch.broadcast_shapes(mask.shape, basis.shape[:-1]) == basis.shape[:-1]
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"the mask must broadcast to {tuple(basis.shape[:-1])}, got {tuple(mask.shape)}"
        )


def _check_factors(grad: Tensor, *factors: float | Tensor) -> None:
    for factor in factors:
        if not isinstance(factor, (Tensor, float, int)):
            raise TypeError(f"a factor must be a number or a tensor, got {type(factor).__name__}")
        shape = tuple(factor.shape) if isinstance(factor, Tensor) else ()
        if shape and (grad.ndim < 3 or shape != (grad.shape[-3],)):
            raise ValueError(
                "a factor must have shape () or (H,) for a gradient (..., H, N, d), "
                f"got {shape} for {tuple(grad.shape)}"
            )
