"""One node on Q and K of an attention call, so that backward rescales both in one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spanopt.mathematics.together import rescale_together, worthwhile
from spanopt.node import apply
from spanopt.rescaling import Rescaling
from spanopt.setups import SPAN
from spanopt.shards import is_spread

__all__ = ["can_be_paired", "pair_node"]


def can_be_paired(query: Tensor, key: Tensor, of_query: Rescaling, of_key: Rescaling) -> bool:
    """Return whether :func:`pair_node` can take Q and K, and whether that saves time.

    Args:
        query: Shape ``(..., H, N, d)``.
        key: Shape ``(..., H', M, d)``.
        of_query: How the gradient of ``query`` is rescaled.
        of_key: How the gradient of ``key`` is rescaled.
    """
    for x, rescaling in ((query, of_query), (key, of_key)):
        if not (x.requires_grad and rescaling.projects()) or is_spread(x):
            return False
        if rescaling.setup is not SPAN or rescaling.preserve_norm:
            return False
    return of_query.ridge == of_key.ridge and worthwhile(query, key)


def pair_node(
    query: Tensor,
    key: Tensor,
    of_query: Rescaling,
    of_key: Rescaling,
    *,
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """Return views of Q and K whose gradients are rescaled in backward, both at once.

    The gradients are those of two calls of :func:`spanopt.node.rescaling_node`, up to rounding.
    The views must not be changed in place.

    Args:
        query: Shape ``(..., H, N, d)``.
        key: Shape ``(..., H', N, d)``.
        of_query: How the gradient of ``query`` is rescaled.
        of_key: How the gradient of ``key`` is rescaled.
        masks: For each side a boolean tensor, broadcastable to ``(..., H, N)``, true at real
            tokens.

    Example:
        >>> import torch
        >>> q, k = (torch.ones(2, 1, requires_grad=True) for _ in range(2))
        >>> of_query, of_key = Rescaling(factors=(2.0, 0.0)), Rescaling(factors=(3.0, 0.0))
        >>> a, b = pair_node(q, k, of_query, of_key)
        >>> (a + b).sum().backward()
        >>> q.grad.flatten().round(decimals=4), k.grad.flatten().round(decimals=4)
        (tensor([2., 2.]), tensor([3., 3.]))
    """
    return apply(_PairNode, query, key, of_query, of_key, *masks)


class _PairNode(torch.autograd.Function):
    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        of_query: Rescaling,
        of_key: Rescaling,
        query_mask: Tensor | None,
        key_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return query.view_as(query), key.view_as(key)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        query, key, ctx.of_query, ctx.of_key, query_mask, key_mask = inputs
        ctx.save_for_backward(query, key, query_mask, key_mask)

    @staticmethod
    def backward(ctx: Any, of_query: Tensor, of_key: Tensor) -> tuple[Tensor | None, ...]:
        query, key, *masks = ctx.saved_tensors
        scaled = rescale_together(
            (of_query, of_key),
            (query, key),
            (ctx.of_query.used_factors(), ctx.of_key.used_factors()),
            ridge=ctx.of_query.ridge,
            masks=masks,
        )
        return *scaled, None, None, None, None
