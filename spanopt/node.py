"""The node put on Q and K: identity forward, rescaled backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spanopt.projection import rescale

__all__ = ["span_node", "uniform_node"]


def span_node(
    x: Tensor,
    parallel: float | Tensor,
    violation: float | Tensor,
    *,
    ridge: float | None = None,
    mask: Tensor | None = None,
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
    return _SpanNode.apply(x, parallel, violation, mask, ridge)


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
    return _UniformNode.apply(x, factor)


# The scales are attributes of ctx: saved for backward, a later change would be a version error.
class _SpanNode(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, parallel: Tensor, violation: Tensor, mask: Tensor | None, ridge: float | None
    ) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.parallel, ctx.violation, mask, ctx.ridge = inputs
        ctx.save_for_backward(x, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mask = ctx.saved_tensors
        scaled = rescale(
            grad,
            x,
            parallel=ctx.parallel,
            violation=ctx.violation,
            ridge=ctx.ridge,
            mask=mask,
        )
        return scaled, None, None, None, None


class _UniformNode(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, factor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor = ctx.factor[..., None, None].to(grad.device) if ctx.factor.ndim else ctx.factor
        return (grad * factor).to(grad.dtype), None
