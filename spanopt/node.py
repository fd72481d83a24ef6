"""The nodes on Q and K: the identity in forward, and a rescaled gradient in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers

from spanopt.mathematics.checks import check_ridge
from spanopt.rescaling import Rescaling, unfit_dtypes
from spanopt.setups import SPAN, Setup, SetupFunction
from spanopt.shards import Spread, is_spread, on_shards

__all__ = ["apply", "rescaling_node", "span_node", "switch_on", "switched_node", "uniform_node"]


def span_node(
    x: Tensor,
    parallel: float | Tensor,
    violation: float | Tensor,
    *,
    ridge: float | None = None,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    projection: str | Setup | SetupFunction = "span",
    preserve_norm: bool = False,
    other: Tensor | None = None,
) -> Tensor:
    """Return a view of ``x`` whose gradient is rescaled in backward.

    Forward values are those of ``x``, bit for bit. In backward the gradient g becomes
    ``parallel * P g + violation * (g - P g)``. Here P is the projector onto the column space of
    ``x``. Under double backward the projector counts as a constant.

    Args:
        x: Q or K, shape ``(..., H, N, d)``.
        parallel: Factor of the parallel part: a number or a tensor of shape ``()`` or ``(H,)``.
            A tensor is read in backward. To change the factor, pass a new tensor and leave the
            values of the old one alone.
        violation: Factor of the violation: a number or a tensor of shape ``()`` or ``(H,)``.
        ridge: Relative ridge; ``None`` for the dtype's default, see :func:`spanopt.project`.
        mask: Boolean, broadcastable to ``(..., H, N)``, true at real tokens. ``None`` if all are.
        documents: Given in place of ``mask`` if a sequence holds several documents, each with its
            own span: integers, shape ``(T, L)``; see
            :func:`spanopt.projection.rescale_by_document`.
        projection: What counts as the parallel part: the name of a setup of
            :mod:`spanopt.setups`, a ``Setup``, or a function like that of a setup.
        preserve_norm: Whether the rescaled gradient gets the norm of the given one, for each
            sequence and head.
        other: K if ``x`` is Q, and Q if ``x`` is K, shape ``(..., H, M, d)``. It is required if
            the setup needs the other side. A function counts as needing it.

    Returns:
        A view of ``x``.

    Raises:
        TypeError: ``projection`` is not a setup, or ``x`` is a ``DTensor`` and ``projection`` is
            not ``"span"``.
        ValueError: The setup needs ``other``, or a number is not finite in the dtype of ``x``.

    Example:
        >>> import torch
        >>> q = torch.tensor([[1.0], [1.0], [0.0]], requires_grad=True)
        >>> y = span_node(q, torch.tensor(2.0), torch.tensor(1.0))
        >>> (y * torch.tensor([[3.0], [1.0], [5.0]])).sum().backward()
        >>> q.grad.round(decimals=4).squeeze(-1)
        tensor([5., 3., 5.])
    """
    check_ridge(ridge)
    setup = Setup.of(projection)
    setup.check_other(other, "span_node(other=None)")
    rescaling = Rescaling(setup, ridge, preserve_norm, (parallel, violation))
    if not isinstance(parallel, Tensor) and not isinstance(violation, Tensor):
        rescaling.unfit = unfit_dtypes((parallel, violation))
        rescaling.check_range(x.dtype, "span_node")
    return rescaling_node(x, rescaling, mask=mask, documents=documents, other=other)


def rescaling_node(
    x: Tensor,
    rescaling: Rescaling,
    *,
    mask: Tensor | None = None,
    documents: Tensor | None = None,
    other: Tensor | None = None,
) -> Tensor:
    """Return a view of ``x`` whose gradient is rescaled in backward.

    Args:
        x: Q or K, shape ``(..., H, N, d)``.
        rescaling: How the gradient is rescaled.
        mask: Boolean, broadcastable to ``(..., H, N)``, true at real tokens.
        documents: Integers, shape ``(T, L)``, see
            :func:`spanopt.projection.rescale_by_document`.
        other: The other side, where the setup needs it.

    Returns:
        A view of ``x``.

    Raises:
        TypeError: ``x`` is a ``DTensor`` and is projected with a setup other than ``"span"`` or
            with ``preserve_norm``.

    Example:
        >>> import torch
        >>> q = torch.ones(2, 1, requires_grad=True)
        >>> rescaling_node(q, Rescaling(factors=(2.0, 0.0))).sum().backward()
        >>> q.grad.flatten().round(decimals=4)
        tensor([2., 2.])
    """
    if not rescaling.projects():
        mask = documents = other = None
    if not is_spread(x):
        return apply(_RescalingNode, x, rescaling, mask, documents, other, None)
    if rescaling.projects() and (rescaling.setup is not SPAN or rescaling.preserve_norm):
        raise TypeError(
            f"the projection {rescaling.setup.name!r} and preserve_norm can't be taken of a "
            "DTensor, which is spread over processes; use projection='span' there"
        )

    def node(x: Tensor, factors: Any, mask: Any, documents: Any, spread: Spread | None) -> Tensor:
        local = Rescaling(SPAN, rescaling.ridge, factors=factors, mode=rescaling.mode)
        return apply(_RescalingNode, x, local, mask, documents, None, spread)

    return on_shards(node, x, rescaling.pair(), mask, documents)


def uniform_node(x: Tensor, factor: Tensor) -> Tensor:
    """Return a view of ``x`` whose gradient is multiplied by ``factor`` in backward.

    :func:`span_node` gives the same result if both factors are equal. Here nothing is projected or
    saved.

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
    return rescaling_node(x, Rescaling(factors=(factor, factor), mode="uniform"))


def switched_node(
    x: Tensor,
    query: Rescaling,
    key: Rescaling,
    *,
    documents: Tensor | None = None,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a view of ``x``, which may turn out to be Q, K or neither.

    This is like :func:`span_node`, but the gradient passes unchanged unless :func:`switch_on` is
    called with the two other tensors that this returns. Their values mean nothing. Their gradients
    tell the node in backward what ``x`` was. In eager code a flag in Python would be enough. But
    ``torch.compile`` traces a node's backward together with the node, before the flag can be set.

    Args:
        x: Shape ``(B, ..., N, d)`` or ``(N, d)``.
        query: How the gradient is rescaled if ``x`` is Q, with the factors in one tensor.
        key: How the gradient is rescaled if ``x`` is K, with the factors in one tensor.
        documents: Integers, shape ``(T, L)``, see
            :func:`spanopt.projection.rescale_by_document`.
        other: The tensor that ``x`` is multiplied by, where the setup needs the other side.

    Returns:
        The view, and the two tensors for :func:`switch_on`.

    Example:
        >>> import torch
        >>> q = torch.ones(2, 1, requires_grad=True)
        >>> twice = Rescaling(factors=torch.tensor([2.0, 2.0]), mode="uniform")
        >>> y, switch, padding = switched_node(q, twice, Rescaling(factors=torch.ones(2)))
        >>> switch_on(y * 3, switch, padding, side="query").sum().backward()
        >>> q.grad.flatten().round(decimals=4)
        tensor([6., 6.])
    """
    return apply(_SwitchedNode, x, query, key, documents, other)


def switch_on(
    x: Tensor, switch: Tensor, padding: Tensor, *, side: str, mask: Tensor | None = None
) -> Tensor:
    """Return a view of ``x`` whose backward turns a :func:`switched_node` on.

    Args:
        x: A tensor computed from the node's view.
        switch: The second result of :func:`switched_node`.
        padding: The third result of :func:`switched_node`.
        side: What the node's tensor turned out to be: ``"query"`` or ``"key"``.
        mask: Boolean, broadcastable to ``(B, N)``, true at real tokens; ``None`` if all are, or if
            the node has documents.

    Returns:
        A view of ``x``.

    Example:
        See :func:`switched_node`.
    """
    return apply(_SwitchOn, x, switch, padding, mask, 1.0 if side == "query" else -1.0)


def apply(node: type[torch.autograd.Function], *inputs: Any) -> Any:
    """Return ``node.apply(*inputs)``, in eager code without the binding of inputs to a signature.

    That binding, which fills in default values, takes longer than the rest of a node.

    Args:
        node: A function of autograd that has a ``setup_context``.
        *inputs: All arguments of its forward, by position.

    Example:
        >>> import torch
        >>> q = torch.ones(2, 1, requires_grad=True)
        >>> apply(_SwitchOn, q, q.new_zeros(()), q.new_zeros(1, 2), None, 1.0).shape
        torch.Size([2, 1])
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return node.apply(*inputs)
    inputs = unwrap_dead_wrappers(inputs)
    return super(torch.autograd.Function, node).apply(*inputs)  # type: ignore[misc]


# The factors are attributes of ctx. If they were saved for backward, changing them later would be a
# version error.
class _RescalingNode(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        rescaling: Rescaling,
        mask: Tensor | None,
        documents: Tensor | None,
        other: Tensor | None,
        spread: Spread | None,
    ) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.rescaling, mask, documents, other, ctx.spread = inputs
        if ctx.rescaling.projects():
            ctx.save_for_backward(x, mask, documents, other)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.rescaling.projects():
            return ctx.rescaling(grad, grad), None, None, None, None, None
        x, mask, documents, other = ctx.saved_tensors
        total = None if ctx.spread is None else ctx.spread.total
        tokens = {"mask": mask, "documents": documents}
        scaled = ctx.rescaling(grad, x, other=other, total=total, **tokens)
        return scaled, None, None, None, None, None


class _SwitchedNode(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        query: Rescaling,
        key: Rescaling,
        documents: Tensor | None,
        other: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch = x.shape[0] if x.ndim > 2 else 1
        return x.view_as(x), x.new_zeros(()), x.new_zeros(batch, x.shape[-2])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.query, ctx.key, documents, other = inputs
        ctx.save_for_backward(x, documents, other)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, switch: Tensor | None, padding: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad is None or switch is None:
            return grad, None, None, None, None
        x, documents, other = ctx.saved_tensors
        shape, mask = x.shape, None
        if grad.ndim > 4:  # dimensions of grouped heads become one: (B, H, N, d)
            x, grad = x.flatten(1, -3), grad.flatten(1, -3)
            other = other if other is None else other.flatten(1, -3)
        if padding is not None:  # a token is padding if it is so in all of the softmaxes
            mask = (padding if x.ndim > 2 else padding[0]) < switch.abs()
            mask = mask[(slice(None), *(None,) * (x.ndim - 3))] if x.ndim > 3 else mask
        rescaling = ctx.query.or_else(ctx.key, switch > 0, x.shape[-3] if x.ndim > 2 else 0)
        scaled = rescaling(grad, x, mask=mask, documents=documents, other=other)
        return torch.where(switch == 0, grad, scaled).reshape(shape), None, None, None, None


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
