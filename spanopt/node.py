"""The node put on Q and K: identity forward, rescaled backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from spanopt.projection import inverse_power, largest_entries, rescale, rescale_by_document
from spanopt.setups import SETUPS, Setup, setup_name
from spanopt.shards import Spread, is_spread, on_shards

__all__ = [
    "Method",
    "multiplied",
    "rescale_tokens",
    "span_node",
    "switch_on",
    "switched_node",
    "uniform_node",
]


class Method(NamedTuple):
    """How a gradient is rescaled, beside the factors.

    Attributes:
        ridge: As in :func:`spanopt.project`.
        setup: Name of a projection setup, see :mod:`spanopt.setups`.
        preserve_norm: Whether the rescaled gradient gets the norm of the given one, for each
            sequence and head.
    """

    ridge: float | None = None
    setup: str = "span"
    preserve_norm: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is the span's, with nothing else done."""
        return self.setup == "span" and not self.preserve_norm


def span_node(
    x: Tensor,
    parallel: float | Tensor,
    violation: float | Tensor,
    *,
    ridge: float | None = None,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    projection: str | Setup = "span",
    preserve_norm: bool = False,
    other: Tensor | None = None,
) -> Tensor:
    """Return a view of ``x`` whose gradient is rescaled by span on its way back.

    Forward values are those of ``x``, bit for bit. In backward the gradient g becomes
    ``parallel * P g + violation * (g - P g)``, P the projector onto the column space of ``x``.
    Under double backward the projector counts as a constant.

    Args:
        x: Q or K, shape ``(..., H, N, d)``.
        parallel: Factor of the parallel span, a number or a tensor of shape ``()`` or ``(H,)``.
            A tensor is read in backward: to change it, replace it, not its value.
        violation: Factor of the violation, likewise.
        ridge: As in :func:`spanopt.project`.
        mask: As in :func:`spanopt.project`.
        documents: One span for each of several documents in a sequence, in place of ``mask``: as in
            :func:`spanopt.projection.rescale_by_document`.
        projection: What counts as the parallel part: see :mod:`spanopt.setups`.
        preserve_norm: Whether the rescaled gradient gets the norm of the given one, for each
            sequence and head.
        other: K if ``x`` is Q, and Q if it is K, where ``projection`` needs it.

    Returns:
        A view of ``x``.

    Example:
        >>> import torch
        >>> q = torch.tensor([[1.0], [1.0], [0.0]], requires_grad=True)
        >>> y = span_node(q, torch.tensor(2.0), torch.tensor(1.0))
        >>> (y * torch.tensor([[3.0], [1.0], [5.0]])).sum().backward()
        >>> q.grad.round(decimals=4).squeeze(-1)
        tensor([5., 3., 5.])
    """
    method = Method(ridge, setup_name(projection), preserve_norm)
    if not is_spread(x):
        return _SpanNode.apply(x, parallel, violation, mask, documents, other, None, *method)
    if not method.is_plain:
        raise TypeError(
            f"the projection {method.setup!r} and preserve_norm can't be taken of a DTensor, which "
            "is spread over processes; use projection='span' there"
        )

    def node(x: Tensor, factors: Any, mask: Any, documents: Any, spread: Spread | None) -> Tensor:
        return _SpanNode.apply(x, *factors, mask, documents, None, spread, *method)

    return on_shards(node, x, (parallel, violation), mask, documents)


def uniform_node(x: Tensor, factor: Tensor) -> Tensor:
    """Return a view of ``x`` whose gradient is multiplied by ``factor`` on its way back.

    What :func:`span_node` does when both factors are equal, with no projection and nothing saved.

    Args:
        x: Q or K, shape ``(..., H, N, d)``.
        factor: Shape ``()`` or ``(H,)``.

    Returns:
        A view of ``x``.

    Example:
        >>> import torch
        >>> q = torch.ones(2, 1, requires_grad=True)
        >>> uniform_node(q, torch.tensor(3.0)).sum().backward()
        >>> q.grad.squeeze(-1)
        tensor([3., 3.])
    """
    if not is_spread(x):
        return _UniformNode.apply(x, factor)
    return on_shards(lambda x, factors, *_: _UniformNode.apply(x, *factors), x, (factor,))


def switched_node(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    project: bool = True,
    method: Method = Method(),  # noqa: B008
    documents: Tensor | None = None,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a view of ``x``, which may turn out to be Q, K or neither.

    Like :func:`span_node`, but the gradient passes unchanged unless :func:`switch_on` is called
    with the two other tensors that this returns. They carry no value: it is their gradient that
    tells the node, on the way back, what ``x`` was. A flag in Python would do as much in eager
    code, but ``torch.compile`` traces a node's backward at the node, before it can be set.

    Args:
        x: Shape ``(B, ..., N, d)`` or ``(N, d)``.
        query: Parallel and violation that hold if ``x`` is Q, shape ``(2,)`` or ``(2, H)``. Where
            both are 1 the gradient is multiplied by 1 and not left alone.
        key: Likewise, if it is K.
        project: Whether any of the factors differ; otherwise nothing is projected.
        method: How it is rescaled.
        documents: As in :func:`span_node`.
        other: Likewise.

    Returns:
        The view, and the two tensors for :func:`switch_on`.

    Example:
        >>> import torch
        >>> q = torch.ones(2, 1, requires_grad=True)
        >>> twice, once = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> y, switch, padding = switched_node(q, twice, once)
        >>> switch_on(y * 3, switch, padding, side="query").sum().backward()
        >>> q.grad.flatten()
        tensor([6., 6.])
    """
    return _SwitchedNode.apply(x, query, key, documents, other, project, *method)


def switch_on(
    x: Tensor, switch: Tensor, padding: Tensor, *, side: str, mask: Tensor | None = None
) -> Tensor:
    """Return a view of ``x`` whose backward turns a :func:`switched_node` on.

    Args:
        x: A tensor computed from the node's.
        switch: From :func:`switched_node`.
        padding: Likewise.
        side: What the node's tensor turned out to be: ``"query"`` or ``"key"``.
        mask: Boolean, broadcastable to ``(B, N)``, true at real tokens, if it was not known before.

    Returns:
        A view of ``x``.

    Example:
        See :func:`switched_node`.
    """
    return _SwitchOn.apply(x, switch, padding, mask, 1.0 if side == "query" else -1.0)


def rescale_tokens(
    grad: Tensor,
    x: Tensor,
    parallel: float | Tensor,
    violation: float | Tensor,
    method: Method,
    mask: Tensor | None,
    documents: Tensor | None,
    spread: Spread | None = None,
    other: Tensor | None = None,
) -> Tensor:
    """Rescale a gradient by the span of a sequence's real tokens, or of each of its documents.

    Args:
        grad: As in :func:`spanopt.rescale`.
        x: Q or K.
        parallel: As in :func:`spanopt.rescale`.
        violation: Likewise.
        method: How it is rescaled.
        mask: As in :func:`spanopt.rescale`.
        documents: As in :func:`spanopt.projection.rescale_by_document`, in place of ``mask``.
        spread: The processes that have the other tokens of the sequences, if there are no
            documents.
        other: As in :func:`span_node`.

    Returns:
        The rescaled gradient.

    Example:
        >>> import torch
        >>> one = torch.tensor(1.0)
        >>> g, q = torch.tensor([[3.0], [1.0], [5.0]]), torch.tensor([[1.0], [1.0], [0.0]])
        >>> rescale_tokens(g, q, 2 * one, one, Method(), None, None).round(decimals=4).squeeze(-1)
        tensor([5., 3., 5.])
    """
    factors: dict[str, Any] = {"parallel": parallel, "violation": violation}
    if method.setup != "span":
        other = x if other is None else other
        of_span = SETUPS[method.setup](grad, x, other, ridge=method.ridge, mask=mask)
        scaled = multiplied(of_span, parallel - violation)
        if isinstance(violation, Tensor) or violation != 0:
            scaled = scaled + multiplied(grad, violation)
    elif documents is None:
        scaled = rescale(grad, x, ridge=method.ridge, mask=mask, spread=spread, **factors)
    else:
        scaled = rescale_by_document(grad, x, documents, ridge=method.ridge, **factors)
    return _with_norm_of(grad, scaled) if method.preserve_norm else scaled


def _with_norm_of(grad: Tensor, scaled: Tensor) -> Tensor:
    """Give each matrix (N, d) of a rescaled gradient the norm that it had before."""
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    grad_dtype, grad, scaled = grad.dtype, grad.to(dtype), scaled.to(dtype)
    # Squares of the entries must not leave the range of the dtype.
    one, other = (inverse_power(largest_entries(x)) for x in (grad.detach(), scaled.detach()))
    scaled = scaled * other
    before, after = (
        torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) for x in (grad * one, scaled)
    )
    return (scaled * (before / torch.where(after == 0, 1, after)) / one).to(grad_dtype)


# The scales are attributes of ctx: saved for backward, a later change would be a version error.
class _SpanNode(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        parallel: Tensor,
        violation: Tensor,
        mask: Tensor | None,
        documents: Tensor | None,
        other: Tensor | None,
        spread: Spread | None,
        *method: Any,
    ) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.parallel, ctx.violation, mask, documents, other, ctx.spread, *ctx.method = inputs
        ctx.save_for_backward(x, mask, documents, other)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, documents, other = ctx.saved_tensors
        factors = ctx.parallel, ctx.violation
        scaled = rescale_tokens(
            grad, x, *factors, Method(*ctx.method), mask, documents, ctx.spread, other
        )
        return scaled, *(None,) * 9


class _SwitchedNode(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        batch = x.shape[0] if x.ndim > 2 else 1
        return x.view_as(x), x.new_zeros(()), x.new_zeros(batch, x.shape[-2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, query, key, documents, other, ctx.project, *ctx.method = inputs
        ctx.factors = query, key
        ctx.save_for_backward(x, documents, other)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, switch: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        rest = (None,) * 8
        if grad is None or switch is None:
            return grad, *rest
        x, documents, other = ctx.saved_tensors
        shape, mask = x.shape, None
        if grad.ndim > 4:  # (B, H, N, d): grouped heads are heads
            x, grad = x.flatten(1, -3), grad.flatten(1, -3)
            other = other if other is None else other.flatten(1, -3)
        if padding is not None:  # in all of the softmaxes
            mask = (padding if x.ndim > 2 else padding[0]) < switch.abs()
            mask = mask[(slice(None), *(None,) * (x.ndim - 3))] if x.ndim > 3 else mask
        heads = x.shape[-3] if x.ndim > 2 else 0
        # A number of values that is not that of the heads is the other side's.
        query, key = (
            factors if factors.ndim == 1 or factors.shape[1] == heads else factors[:, 0]
            for factors in (pair.to(x.device) for pair in ctx.factors)
        )
        if query.ndim != key.ndim:
            query, key = (x if x.ndim > 1 else x[:, None] for x in (query, key))
        parallel, violation = torch.where(switch > 0, query, key).unbind()
        if ctx.project:
            method = Method(*ctx.method)
            scaled = rescale_tokens(
                grad, x, parallel, violation, method, mask, documents, other=other
            )
        else:
            scaled = multiplied(grad, parallel)
        return torch.where(switch == 0, grad, scaled).reshape(shape), *rest


class _SwitchOn(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, switch: Tensor, padding: Tensor, mask: Tensor | None, sign: float
    ) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.switch, padding, ctx.mask, ctx.sign = inputs
        ctx.shape = padding.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        switch = torch.full_like(ctx.switch, ctx.sign)
        padding = None
        if ctx.mask is not None:
            padding = (~ctx.mask).to(switch.dtype).expand(ctx.shape)
        return grad, switch, padding, None, None


class _UniformNode(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return multiplied(grad, ctx.factor), None


def multiplied(grad: Tensor, factor: float | Tensor) -> Tensor:
    """Multiply a gradient by a factor.

    Args:
        grad: Shape ``(..., H, N, d)``.
        factor: A number, or a tensor of shape ``()`` or ``(H,)``.

    Returns:
        The product, in the dtype of ``grad``.

    Example:
        >>> multiplied(torch.ones(2, 1, 1), torch.tensor([2.0, 3.0])).flatten()
        tensor([2., 3.])
    """
    if isinstance(factor, Tensor) and factor.ndim:
        factor = factor[..., None, None].to(grad.device)
    return (grad * factor).to(grad.dtype)
